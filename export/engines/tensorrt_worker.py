"""One TensorRT build in a process of its own: ``python -m export.engines.tensorrt_worker request.json``.

It has its own process because a failed build changes the next one in the same process, and a crash must not end the pipeline.
Reports go to stdout, one JSON object a line: its ``event`` is ``phase`` or ``step``, and at last ``done`` or ``failed``.
TensorRT's warnings and errors go to stderr. The end of stdin cancels the build, so that builds end with their parent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from export.engines.tensorrt_layers import (
    LAYERS_PREFIX,
    count_fused_attentions,
    count_kernels,
    narrow_share,
    of_profiles,
    parse_layers,
)
from patchslim.targets import PORTABLE
from patchslim.tensorrt_caches import attach_timing_cache

_STEP_INTERVAL = 0.05  # seconds, at least, between two reported steps: a ViT-Ti takes TensorRT about 1,500 steps


@dataclass(frozen=True)
class BuildRequest:
    """One build.

    ``backend`` is the Python module (``tensorrt``, ``tensorrt_rtx``); ``onnx``, ``engine`` and ``layers`` are paths;
    ``target`` is an architecture (``sm89``) or ``portable``, None for this machine's GPU; ``image_shape`` is (channels, height,
    width); ``profiles`` are each the smallest, usual and largest batch, none where the ONNX file's is fixed; ``attentions`` are
    the names of its Softmax and Attention nodes. ``tf32``, ``workspace`` (bytes), ``optimization_level`` and ``flags`` are
    those of ``export.engines.base.BuildSettings``. ``timing`` is a file with the times of kernels that are known, and is
    rewritten with those that became so; None: none are kept.
    """

    backend: str
    onnx: str
    engine: str
    layers: str
    target: str | None
    precision: str
    input_name: str
    image_shape: tuple[int, int, int]
    profiles: list[list[int]]
    attentions: list[str]
    tf32: bool = False
    workspace: int | None = None
    optimization_level: int = 3
    flags: list[str] = field(default_factory=list)
    timing: str | None = None

    def write(self, path: Path) -> None:
        """Write the request as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> BuildRequest:
        """Read what ``write`` wrote."""
        return cls(**json.loads(path.read_text()))


class BuildFailed(Exception):  # noqa: N818
    """A build that cannot be made: ``kind`` is ``rejected`` (because of the ONNX file) or ``unavailable`` (backend, target)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def main(request_path: str) -> int:
    """Build what the request asks for and return 0, or report why not and return 1."""
    # TensorRT's native code prints to stdout too: it gets stderr instead, and the real stdout is for reports alone.
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        outcome = {"event": "done", **build(BuildRequest.read(Path(request_path)), reports)}
    except BuildFailed as error:
        outcome = {"event": "failed", "kind": error.kind, "message": str(error)}
    with contextlib.suppress(OSError):  # the parent may be gone
        print(json.dumps(outcome), file=reports, flush=True)
    # End without clean-up: a thread still waits on stdin, and everything is written.
    os._exit(0 if outcome["event"] == "done" else 1)


def build(request: BuildRequest, reports: TextIO) -> dict[str, Any]:
    """Build the engine, and write it and its list of layers to the paths of ``request``.

    Returns the fields of the ``done`` event: ``version`` of the backend, ``seconds`` of the build, whether the known times of
    kernels were taken (``timing``) and, where the layers could
    be read, ``kernels`` and ``fused_attentions`` (of several profiles the most and the fewest), and ``narrow_share``. Raises
    ``BuildFailed``.
    """
    try:
        trt: Any = importlib.import_module(request.backend)
    except (ImportError, OSError, RuntimeError) as error:
        raise BuildFailed("unavailable", f"{request.backend} is installed but cannot be loaded: {error}") from error
    logger = _make_logger(trt)
    builder = trt.Builder(logger)
    network = _parse(trt, logger, builder, request)
    config = _configure(trt, builder, network, request)
    timing = None if request.timing is None else Path(request.timing)
    taken = timing is not None and attach_timing_cache(config, timing.read_bytes(), logger.warnings)
    config.progress_monitor = _make_monitor(trt, reports)
    started = time.perf_counter()
    serialized = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if serialized is None:
        raise BuildFailed("unavailable", " ".join(logger.errors) or "TensorRT built no engine and gave no reason")
    engine = bytes(serialized)
    Path(request.engine).write_bytes(engine)
    if timing is not None:
        timing.write_bytes(bytes(config.get_timing_cache().serialize()))
    layers = logger.layers or (_inspect(trt, logger, engine) if request.target is None else "")
    return {"version": trt.__version__, "seconds": seconds, "timing": taken, **_write_layers(request, layers)}


def _parse(trt: Any, logger: Any, builder: Any, request: BuildRequest) -> Any:
    # TensorRT 10 keeps the types of the ONNX file only under this flag. 11 always does, and may lose the flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.onnx):
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        raise BuildFailed("rejected", "; ".join(f"{p.desc()}{_at(p)}" for p in problems) or "the parser gave no reason")
    if network.num_layers == 0:
        raise BuildFailed("rejected", "TensorRT's parser found no layers in it")
    return network


def _at(problem: Any) -> str:
    return f" (node {problem.node_name()}, {problem.node_operator()})" if problem.node_operator() else ""


def _configure(trt: Any, builder: Any, network: Any, request: BuildRequest) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not request.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; it rounds to 10 bits of mantissa
    if request.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
    config.builder_optimization_level = request.optimization_level
    for name in request.flags:
        if not hasattr(trt.BuilderFlag, name):
            raise BuildFailed("unavailable", f"{request.backend} {trt.__version__} has no builder flag {name}")
        config.set_flag(getattr(trt.BuilderFlag, name))
    if request.target not in (None, PORTABLE):  # with none set TensorRT-RTX builds one engine for several generations
        capability = getattr(getattr(trt, "ComputeCapability", None), str(request.target).upper(), None)
        if capability is None:
            raise BuildFailed("unavailable", f"{request.backend} {trt.__version__} does not build for {request.target}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    for sizes in request.profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape(request.input_name, *((size, *request.image_shape) for size in sizes))
        config.add_optimization_profile(profile)
    return config


def _inspect(trt: Any, logger: Any, engine: bytes) -> str:
    """Return the engine's layers by its inspector, for releases that do not log them; needs the GPU. Not executed so far."""
    runtime = trt.Runtime(logger)
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        return ""
    return str(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))


def _write_layers(request: BuildRequest, message: str) -> dict[str, Any]:
    try:
        kernels = parse_layers(message)
    except ValueError as error:
        print(f"kernels not listed: {error}", file=sys.stderr)
        return {}
    parts = of_profiles(kernels, len(request.profiles)) if len(request.profiles) > 1 else [kernels]
    fused = min(count_fused_attentions(part, request.attentions) for part in parts)
    share = narrow_share(kernels, 8 if request.precision in ("int8", "fp8") else 16)
    layers = {"kernels": kernels, "fused_attentions": fused, "attentions": len(request.attentions), "narrow_share": share}
    Path(request.layers).write_text(json.dumps(layers))
    return {"kernels": max(map(count_kernels, parts)), "fused_attentions": fused, "narrow_share": share}


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Stores the last list of layers and all warnings and errors, and prints these to stderr."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = ""
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if message.startswith(LAYERS_PREFIX):
                self.layers = message
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            if severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING):
                print(message, file=sys.stderr, flush=True)

    return Logger()


def _make_monitor(trt: Any, reports: TextIO) -> Any:
    cancelled = threading.Event()
    lock = threading.Lock()

    def wait_for_end_of_stdin() -> None:
        while os.read(0, 1):
            pass
        cancelled.set()

    threading.Thread(target=wait_for_end_of_stdin, daemon=True).start()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports phases and steps, these at most every 50 ms; TensorRT calls it from several threads."""

        def __init__(self) -> None:
            super().__init__()
            self._open: dict[str, tuple[str | None, int]] = {}
            self._last = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with lock:
                self._open[name] = (parent, steps)
                self._report("phase", name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            with lock:
                now = time.monotonic()
                if now - self._last >= _STEP_INTERVAL:
                    self._last = now
                    self._report("step", name, step + 1)
            return not cancelled.is_set()

        def phase_finish(self, name: str) -> None:
            with lock:
                self._report("step", name, self._open[name][1])
                del self._open[name]

        def _report(self, event: str, name: str, step: int) -> None:
            parent, total = self._open.get(name, (None, step))
            line = {"event": event, "phase": name, "parent": parent, "step": step, "total": total}
            try:
                print(json.dumps(line), file=reports, flush=True)
            except OSError:  # the parent is gone
                cancelled.set()

    return Monitor()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
