"""Which engines, for which targets and in which precisions, work on this machine: asked of the code that builds them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from export.engines import onnx_runtime, openvino_build, tensorrt_build
from export.engines.base import ENGINES, QUANTISED
from patchslim import cuda
from patchslim.choices import EngineName, Precision
from patchslim.device import cpu_flags
from patchslim.errors import PatchslimError
from patchslim.packages import extra_for, install_command, missing
from patchslim.targets import runs_on

Status = Literal["runs", "builds", "refused", "missing"]
"""runs: built and executed here. builds: built here, for a GPU that is not here. refused: not in this precision or on this
machine. missing: a package is not installed."""


#: Flags of a processor that multiplies in bfloat16, in Linux's words.
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


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
        _PROBES[engine](target, precision)
        for engine, traits in ENGINES.items()
        for target in _targets(engine)
        for precision in traits.precisions
    ]


def engines_here(precision: Precision | Literal["auto"] | None = None) -> tuple[list[EngineName], dict[EngineName, str]]:
    """The engines that work here in ``precision``, None: each in its default one; and why each other engine does not."""
    here, left_out, support = list[EngineName](), dict[EngineName, str](), engine_support()
    for engine, traits in ENGINES.items():
        wanted = traits.default if precision in (None, "auto") else precision
        found = [row for row in support if row.engine == engine and row.precision == wanted]
        if not found or (precision == "auto" and engine != "openvino"):
            left_out[engine] = f"takes {', '.join(traits.precisions)}, not {precision}"
        elif any(row.status in ("runs", "builds") for row in found):
            here.append(engine)
        else:
            left_out[engine] = found[0].reason
    return here, left_out


def _targets(engine: EngineName) -> list[str]:
    """What can be asked for: the table's targets, and for TensorRT the GPU of this machine."""
    here = [local] if engine == "trt" and (local := cuda.local_target()) else []
    return list(dict.fromkeys([*ENGINES[engine].targets, *here]))


def _ort(target: str, precision: Precision) -> EngineSupport:
    if importlib.util.find_spec("onnxruntime") is None:
        reason = f"onnxruntime is not installed: {install_command(extra_for('onnxruntime', 'export') or 'export')}"
        return EngineSupport("ort", target, precision, "missing", reason=reason)
    if precision == "int8" and (reason := _no_int8()):
        return EngineSupport("ort", target, precision, "missing", reason=reason)
    if precision not in ENGINES["ort"].targets[target]:
        return EngineSupport("ort", target, precision, "refused", reason=f"{precision} is for a CPU")
    if target == "cpu":
        return EngineSupport("ort", target, precision, "runs", "onnxruntime")
    if onnx_runtime.has_cuda():
        return EngineSupport("ort", target, precision, "runs", "onnxruntime", "where CUDA's libraries are complete: not tried")
    reason = "needs a visible NVIDIA GPU, and onnxruntime-gpu in place of onnxruntime"
    return EngineSupport("ort", target, precision, "refused", "onnxruntime", reason)


def _no_int8() -> str:
    if importlib.util.find_spec("nncf") is not None:
        return ""
    return f"NNCF is not installed: {install_command(extra_for('nncf', 'nncf') or 'nncf')}"


def _openvino(target: str, precision: Precision) -> EngineSupport:
    try:
        openvino_build.choose_backend((target,))  # whether the CPU has bfloat16 is seen without importing OpenVINO
    except PatchslimError as error:
        return EngineSupport("openvino", target, precision, "missing", reason=str(error))
    if precision == "int8" and (reason := _no_int8()):
        return EngineSupport("openvino", target, precision, "missing", reason=reason)
    flags = cpu_flags()
    if precision == "bf16" and flags and not _BFLOAT16 & set(flags):
        return EngineSupport("openvino", target, precision, "refused", reason="this CPU has no bfloat16")
    return EngineSupport("openvino", target, precision, "runs", "openvino")


def _trt(target: str, precision: Precision) -> EngineSupport:
    try:
        backend = tensorrt_build.choose_backend([target], precision).name
    except PatchslimError as error:
        installed = any(importlib.util.find_spec(name) is not None for name in ("tensorrt", "tensorrt_rtx"))
        return EngineSupport("trt", target, precision, "refused" if installed else "missing", reason=str(error))
    if precision in QUANTISED and missing(["modelopt"]):
        reason = f"ModelOpt is not installed: {install_command('modelopt')}"
        return EngineSupport("trt", target, precision, "missing", reason=reason)
    return EngineSupport("trt", target, precision, "runs" if runs_on(target, cuda.local_target()) else "builds", backend)


_PROBES: dict[EngineName, Callable[[str, Precision], EngineSupport]] = {"ort": _ort, "openvino": _openvino, "trt": _trt}
