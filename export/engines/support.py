"""Which engines, for which targets and in which precisions, work on this machine: asked of the code that builds them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from export.engines import onnx_runtime, tensorrt_build
from export.engines.base import ENGINES, TARGETS
from patchslim import cuda
from patchslim.choices import EngineName, Precision
from patchslim.errors import PatchslimError
from patchslim.packages import extra_for, install_command

Status = Literal["runs", "builds", "refused", "missing"]
"""runs: built and executed here. builds: built here, for a GPU that is not here. refused: not in this precision or on this
machine. missing: a package is not installed."""


@dataclass(frozen=True)
class EngineSupport:
    """What ``--engine ENGINE --target TARGET --precision PRECISION`` comes to here; ``reason`` says why not, or how far."""

    engine: EngineName
    target: str
    precision: Precision
    status: Status
    backend: str = ""
    reason: str = ""


def engine_support() -> list[EngineSupport]:
    """Every engine, target and precision, in the order in which they are listed to users. Builds and runs nothing."""
    return [
        row
        for engine, traits in ENGINES.items()
        for target in _TARGETS[engine]()
        for row in (_PROBES[engine](target, precision) for precision in traits.precisions)
    ]


def _ort_targets() -> Iterator[str]:
    yield from ("cpu", "cuda")


def _ort(target: str, precision: Precision) -> EngineSupport:
    if importlib.util.find_spec("onnxruntime") is None:
        reason = f"onnxruntime is not installed: {install_command(extra_for('onnxruntime', 'export') or 'export')}"
        return EngineSupport("ort", target, precision, "missing", reason=reason)
    if target == "cpu":
        return EngineSupport("ort", target, precision, "runs", "onnxruntime")
    if onnx_runtime.has_cuda():
        return EngineSupport("ort", target, precision, "runs", "onnxruntime", "where CUDA's libraries are complete: not tried")
    reason = "needs a visible NVIDIA GPU, and onnxruntime-gpu in place of onnxruntime"
    return EngineSupport("ort", target, precision, "refused", "onnxruntime", reason)


def _trt_targets() -> Iterator[str]:
    yield from dict.fromkeys([*TARGETS, *filter(None, [cuda.local_target()])])


def _trt(target: str, precision: Precision) -> EngineSupport:
    try:
        backend = tensorrt_build.choose_backend([target], precision).name
    except PatchslimError as error:
        installed = any(importlib.util.find_spec(name) is not None for name in ("tensorrt", "tensorrt_rtx"))
        return EngineSupport("trt", target, precision, "refused" if installed else "missing", reason=str(error))
    return EngineSupport("trt", target, precision, "runs" if target == cuda.local_target() else "builds", backend)


_TARGETS: dict[EngineName, Callable[[], Iterator[str]]] = {"ort": _ort_targets, "trt": _trt_targets}
_PROBES: dict[EngineName, Callable[[str, Precision], EngineSupport]] = {"ort": _ort, "trt": _trt}
