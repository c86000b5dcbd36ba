"""One builder for every engine: checks the ONNX file, then hands it to the backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from export.engines.base import Batch, BuildProgressCallback, EngineResult
from export.engines.onnx_info import read_onnx
from patchslim.choices import Precision
from patchslim.errors import InputRejected, UsageError


def build_engine(
    kind: Literal["ort", "trt"],
    onnx_path: Path,
    output_dir: Path,
    *,
    targets: Sequence[str] | None = None,
    precision: Precision = "fp16",
    batch: Batch = (1, 8, 32),
    progress: BuildProgressCallback | None = None,
) -> EngineResult:
    """Make ``onnx_path`` ready to run and say what was made.

    ``ort`` opens the file in ONNX Runtime and runs it once. ``trt`` writes ``STEM.TARGET.engine`` per target and one
    ``engine_layers.json`` into ``output_dir``: all of them, or none. ``precision`` must be what the ONNX file says, since
    engines are strongly typed. ``targets`` None means this machine's GPU with full TensorRT, ``DEFAULT_TARGETS`` with
    TensorRT-RTX. An ONNX file with a fixed batch overrides ``batch``.

    Raises:
        UsageError: unknown target, impossible batch, or fp32 for sm75.
        InputRejected: the ONNX file cannot be used, or is of another precision.
        Unavailable: no backend here, or the backend cannot build this graph for a target.
        KeyboardInterrupt: ``progress`` returned False.
    """
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise UsageError(f"batch {batch}: needs 1 <= smallest <= usual <= largest")
    facts = read_onnx(onnx_path)
    if facts.precision not in (None, precision):
        raise InputRejected(
            f"{onnx_path}: {precision} was asked for, but most of its weights are {facts.precision}; engines keep the types "
            f"of the ONNX file, so convert it first or ask for {facts.precision}"
        )
    if facts.fixed_batch:
        batch = (facts.fixed_batch,) * 3
    if kind == "ort":
        from export.engines import onnx_runtime as ort

        return ort.build(onnx_path, facts, precision=precision, batch=batch)
    from export.engines import tensorrt_build as tensorrt

    return tensorrt.build(
        onnx_path,
        output_dir,
        facts,
        targets=targets,
        precision=precision,
        batch=batch,
        progress=progress or (lambda report: None),
    )
