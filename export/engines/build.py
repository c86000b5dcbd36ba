"""One builder for every engine: checks the ONNX file, then hands it to the backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from export.engines import onnx_runtime, openvino_build, tensorrt_build
from export.engines.base import (
    ENGINES,
    Backend,
    BuildOptions,
    BuildProgressCallback,
    BuildSettings,
    EngineResult,
)
from export.engines.batches import DEFAULT_BATCH, Batch
from export.engines.onnx_info import OnnxFacts, read_onnx
from patchslim.choices import EngineName, PerformanceHint, Precision
from patchslim.errors import InputRejected, UsageError


@dataclass(frozen=True)
class Builder:
    """How an engine is made: ``choose`` says by which backend and what for, ``build`` makes it of an ONNX file in a folder."""

    choose: Callable[[Sequence[str] | None, Precision | None], Backend]
    build: Callable[[Path, Path, OnnxFacts, BuildOptions], EngineResult]


BUILDERS: dict[EngineName, Builder] = {
    "ort": Builder(onnx_runtime.choose_backend, onnx_runtime.build),
    "openvino": Builder(openvino_build.choose_backend, openvino_build.build),
    "trt": Builder(tensorrt_build.choose_backend, tensorrt_build.build),
}


def choose_backend(engine: EngineName, targets: Sequence[str] | None = None, precision: Precision | None = None) -> Backend:
    """Return what would build ``engine`` here, and for which targets; nothing is built.

    Raises ``UsageError`` for a target that nothing builds for, or not in ``precision``; ``Unavailable`` where no backend here
    can build for these targets.
    """
    return BUILDERS[engine].choose(targets, precision)


def build_engine(
    kind: EngineName,
    onnx_path: Path,
    output_dir: Path,
    *,
    targets: Sequence[str] | None = None,
    precision: Precision = "fp16",
    batch: Batch = DEFAULT_BATCH,
    profiles: Sequence[Batch] = (),
    settings: BuildSettings | None = None,
    hint: PerformanceHint = "latency",
    progress: BuildProgressCallback | None = None,
    cache: Path | None = None,
) -> EngineResult:
    """Make ``onnx_path`` ready to run and say what was made.

    ``ort`` opens the file in ONNX Runtime and runs it once. ``openvino`` writes it as an IR into ``output_dir`` and runs that
    once. ``trt`` writes ``STEM.TARGET.engine`` per target and one ``engine_layers.json`` into ``output_dir``: all of them, or
    none. ``precision`` must be what the ONNX file says, since engines are strongly typed, but for bf16 in OpenVINO, which makes
    that of float32. ``hint`` is what OpenVINO is told. ``targets`` None means this machine's GPU with full TensorRT,
    ``default_targets`` with TensorRT-RTX. An ONNX file with a fixed batch overrides ``batch``.
    ``profiles`` are TensorRT's optimisation profiles where they are several, ``settings`` what its builder is told, ``cache``
    is a folder in which what full TensorRT measures is kept.

    Raises ``UsageError`` for an unknown target, an impossible batch, or fp32 for sm75; ``InputRejected`` where the ONNX file
    cannot be used, or is of another precision; ``Unavailable`` where there is no backend here, or it cannot build this graph
    for a target; ``KeyboardInterrupt`` where ``progress`` returned False.
    """
    for profile in (batch, *profiles):
        if not 1 <= profile[0] <= profile[1] <= profile[2]:
            raise UsageError(f"batch {profile}: needs 1 <= smallest <= usual <= largest")
    facts = read_onnx(onnx_path)
    graph = ENGINES[kind].graph(precision)
    if facts.precision not in (None, graph):
        raise InputRejected(
            f"{onnx_path}: {graph} was asked for, but most of its weights are {facts.precision}; engines keep the types "
            f"of the ONNX file, so convert it first or ask for {facts.precision}"
        )
    if facts.fixed_batch:
        batch = (facts.fixed_batch,) * 3
    options = BuildOptions(targets, precision, batch, hint=hint, profiles=profiles, settings=settings, cache=cache)
    if progress is not None:
        options = replace(options, progress=progress)
    return BUILDERS[kind].build(onnx_path, output_dir, facts, options)
