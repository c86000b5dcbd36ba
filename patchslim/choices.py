"""Choices that options, plans and latency tables share, each spelt once."""

from __future__ import annotations

from typing import Literal

Layout = Literal["split", "packed"]
Mode = Literal["compact", "stale"]
Pooling = Literal["token", "avg", "map"]
Fit = Literal["none", "closed-form", "sgd", "distill"]
FitChoice = Literal["none", "closed-form", "sgd", "distill", "auto"]
Criterion = Literal["tolerance", "macs-reduction", "latency-reduction", "latency-budget-ms", "tokens", "manual", "dense"]
ScoreName = Literal["auto", "similarity", "paper", "residual", "attention", "random", "uniform"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
#: What OpenVINO computes in where nothing is quantised, in its words.
InferencePrecision = Literal["f32", "bf16"]
#: Whether OpenVINO gives its threads to one batch, or divides them among several at once.
PerformanceHint = Literal["latency", "throughput"]
EngineName = Literal["ort", "openvino", "trt"]
