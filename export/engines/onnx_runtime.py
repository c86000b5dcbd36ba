"""ONNX Runtime as the engine: the ONNX file itself is what runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.engines.base import Backend, BuildOptions, EngineResult
from export.engines.onnx_info import OnnxFacts
from patchslim import cuda
from patchslim.choices import Precision
from patchslim.errors import Unavailable
from patchslim.ort_runner import CPU, SETTINGS, OrtRunner
from patchslim.packages import install_command, missing

_CUDA = "CUDAExecutionProvider"


def open_runner(path: Path, *, threads: int = 0) -> OrtRunner:
    """Open a classifier on the GPU where ONNX Runtime's CUDA provider starts on this machine, else on the CPU.

    Raises as ``OrtRunner`` does.
    """
    if has_cuda():
        try:
            return OrtRunner(path, provider=_CUDA, threads=threads)
        except Unavailable:  # CUDA's libraries are not complete, or a kernel is only on the CPU
            pass
    return OrtRunner(path, provider=CPU, threads=threads)


def choose_backend(targets: Sequence[str] | None = None, precision: Precision | None = None) -> Backend:
    """ONNX Runtime, on the GPU where it can use that; it has no other targets, and runs every precision.

    Raises ``Unavailable`` where it is not installed.
    """
    if missing(["onnxruntime"]):
        raise Unavailable(f"ONNX Runtime is not installed; install it: {install_command('export')}")
    return Backend("onnxruntime", ("cuda" if has_cuda() else "cpu",))


def build(onnx_path: Path, output_dir: Path, facts: OnnxFacts, options: BuildOptions) -> EngineResult:
    """Open ``onnx_path``, run it once on blank images, and describe it as an engine; nothing is written."""
    with open_runner(onnx_path) as runner:
        runner.infer(np.zeros((options.batch[0], *facts.image_shape), dtype=runner.dtype))
        target = "cpu" if runner.provider == CPU else "cuda"
    import onnxruntime

    return EngineResult(
        backend="onnxruntime",
        version=onnxruntime.__version__,
        targets=[target],
        precision=options.precision,
        batch=options.batch,
        files=[onnx_path],
        layers_file=None,
        attentions=len(facts.attentions),
        executed=True,
        settings=dict(SETTINGS),
    )


def has_cuda() -> bool:
    """Whether ONNX Runtime here has its CUDA provider, and a GPU for it; raises ``Unavailable`` without ONNX Runtime."""
    # onnxruntime-gpu lists its CUDA provider on a machine without a GPU too, and then complains at every session.
    if cuda.local_target() is None:
        return False
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise Unavailable(f"the ort engine needs onnxruntime: {install_command('export')}") from error
    return _CUDA in onnxruntime.get_available_providers()
