"""One TensorRT build in a process of its own: ``python -m export.engines.tensorrt_worker request.json``.

A failed build changes the next one in the same process, and a crash must not take the pipeline along: hence the process.
Reports go to stdout as one JSON object a line, ``event`` first: ``phase``, ``step``, then ``done`` or ``failed``. TensorRT's
warnings and errors go to stderr. The end of stdin cancels the build, so a parent that dies takes its builds with it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from export.engines.tensorrt_layers import LAYERS_PREFIX, count_fused_attentions, count_kernels, parse_layers

_STEP_INTERVAL = 0.05  # seconds between reported steps: TensorRT takes some 1,500 steps for a ViT-Ti


@dataclass(frozen=True)
class BuildRequest:
    """One build; ``target`` None builds for this machine's GPU, ``batch`` None takes the ONNX file's fixed batch."""

    backend: str
    onnx: str
    engine: str
    layers: str
    target: str | None
    precision: str
    input_name: str
    image_shape: tuple[int, int, int]
    batch: tuple[int, int, int] | None
    attentions: list[str]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> BuildRequest:
        return cls(**json.loads(path.read_text()))


class BuildFailed(Exception):  # noqa: N818
    """The build cannot go on; ``kind`` is ``rejected`` (the ONNX file) or ``unavailable`` (the backend or the target)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def main(request_path: str) -> int:
    """Build what the request asks for and return 0, or report why not and return 1."""
    # TensorRT's native code prints to stdout too: keep the real one for reports alone.
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        outcome = {"event": "done", **build(BuildRequest.read(Path(request_path)), reports)}
    except BuildFailed as error:
        outcome = {"event": "failed", "kind": error.kind, "message": str(error)}
    with contextlib.suppress(OSError):  # a parent that was killed reads no more
        print(json.dumps(outcome), file=reports, flush=True)
    # Leave at once: a thread still waits on stdin, and the backends' own clean-up at exit has nothing left to save.
    os._exit(0 if outcome["event"] == "done" else 1)


def build(request: BuildRequest, reports: TextIO) -> dict[str, Any]:
    """Write the engine and its layers; return the backend's version, the seconds taken, and counts of kernels and fusions."""
    try:
        trt: Any = importlib.import_module(request.backend)
    except (ImportError, OSError, RuntimeError) as error:
        raise BuildFailed("unavailable", f"{request.backend} is installed but cannot be loaded: {error}") from error
    logger = _make_logger(trt)
    builder = trt.Builder(logger)
    network = _parse(trt, logger, builder, request)
    config = _configure(trt, builder, network, request)
    config.progress_monitor = _make_monitor(trt, reports)
    started = time.perf_counter()
    serialized = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if serialized is None:
        raise BuildFailed("unavailable", " ".join(logger.errors) or "TensorRT gave no engine and no reason")
    engine = bytes(serialized)
    Path(request.engine).write_bytes(engine)
    layers = logger.layers or (_inspect(trt, logger, engine) if request.target is None else "")
    return {"version": trt.__version__, "seconds": seconds, **_write_layers(request, layers)}


def _parse(trt: Any, logger: Any, builder: Any, request: BuildRequest) -> Any:
    # TensorRT 10 must be told to keep the types of the ONNX file; in 11 nothing else exists, and the flag may go one day.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.onnx):
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        raise BuildFailed("rejected", "; ".join(f"{p.desc()}{_at(p)}" for p in problems) or "the parser gave no reason")
    if network.num_layers == 0:
        raise BuildFailed("rejected", "the parser found no layers in it")
    return network


def _at(problem: Any) -> str:
    return f" (node {problem.node_name()}, {problem.node_operator()})" if problem.node_operator() else ""


def _configure(trt: Any, builder: Any, network: Any, request: BuildRequest) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and not what fp32 promises
    if request.target is not None:
        capability = getattr(getattr(trt, "ComputeCapability", None), request.target.upper(), None)
        if capability is None:
            raise BuildFailed("unavailable", f"{request.backend} {trt.__version__} does not build for {request.target}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    if request.batch is not None:
        profile = builder.create_optimization_profile()
        profile.set_shape(request.input_name, *((size, *request.image_shape) for size in request.batch))
        config.add_optimization_profile(profile)
    return config


def _inspect(trt: Any, logger: Any, engine: bytes) -> str:
    """Ask the engine itself for its layers, for releases that do not log them; needs the GPU, and has not been executed yet."""
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
    fused = count_fused_attentions(kernels, request.attentions)
    layers = {"kernels": kernels, "fused_attentions": fused, "attentions": len(request.attentions)}
    Path(request.layers).write_text(json.dumps(layers))
    return {"kernels": count_kernels(kernels), "fused_attentions": fused}


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the last list of layers and all errors, and passes warnings and errors on to stderr."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = ""
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if message.startswith(LAYERS_PREFIX):
                self.layers = message
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
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
        """Reports phases and, at most every 50 ms, steps; TensorRT calls it from several threads."""

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
