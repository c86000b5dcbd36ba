"""ONNX Runtime as the engine: the ONNX file itself is what runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.engines.base import Batch, EngineResult
from export.engines.onnx_info import OnnxFacts
from patchslim.choices import Precision
from patchslim.errors import Unavailable
from patchslim.ort_runner import CPU, OrtRunner

_CUDA = "CUDAExecutionProvider"


def open_runner(path: Path, *, threads: int = 0) -> OrtRunner:
    """Open a classifier on the GPU where ONNX Runtime's CUDA provider starts on this machine, else on the CPU.

    Raises as ``OrtRunner`` does.
    """
    if _has_cuda():
        try:
            return OrtRunner(path, provider=_CUDA, threads=threads)
        except Unavailable:  # CUDA's libraries are not complete, or a kernel is only on the CPU
            pass
    return OrtRunner(path, provider=CPU, threads=threads)


def build(onnx_path: Path, facts: OnnxFacts, *, precision: Precision, batch: Batch) -> EngineResult:
    """Open ``onnx_path``, run it once on blank images, and describe it as an engine."""
    with open_runner(onnx_path) as runner:
        runner.infer(np.zeros((batch[0], *facts.image_shape), dtype=runner.dtype))
        target = "cpu" if runner.provider == CPU else "cuda"
    import onnxruntime

    return EngineResult(
        backend="onnxruntime",
        version=onnxruntime.__version__,
        targets=[target],
        precision=precision,
        batch=batch,
        files=[onnx_path],
        layers_file=None,
        attentions=len(facts.attentions),
        executed=True,
    )


def _has_cuda() -> bool:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise Unavailable('the ort engine needs onnxruntime: pip install "patchslim[export]"') from error
    from export.engines import cuda

    # onnxruntime-gpu lists its CUDA provider on a machine without a GPU too, and then complains at every session.
    return _CUDA in onnxruntime.get_available_providers() and cuda.local_target() is not None
