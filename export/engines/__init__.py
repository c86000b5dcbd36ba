"""Engines: an ONNX file made ready to run, by ONNX Runtime or by TensorRT. Cheap to import; the backends load on first use."""

from export.engines.base import DEFAULT_TARGETS, TARGETS, EngineResult, Progress, build_engine

__all__ = ["DEFAULT_TARGETS", "TARGETS", "EngineResult", "Progress", "build_engine"]
