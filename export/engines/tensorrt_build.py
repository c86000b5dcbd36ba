"""TensorRT engines, by full TensorRT or by TensorRT-RTX: one build for both, told apart by what each of them has."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.engines.base import (
    TARGETS,
    Backend,
    BackendName,
    BuildOptions,
    BuildProgress,
    BuildProgressCallback,
    BuildSettings,
    EngineResult,
    check_precision,
    default_targets,
)
from export.engines.batches import Batch
from export.engines.onnx_info import OnnxFacts
from export.engines.tensorrt_worker import BuildRequest
from patchslim import cuda
from patchslim.blob_cache import keep_blob, kept_blob, warn_of_dropped
from patchslim.choices import Precision
from patchslim.errors import InputRejected, Unavailable, UsageError, did_you_mean
from patchslim.packages import PACKAGES, install_command, missing
from patchslim.targets import target_for
from patchslim.tensorrt_caches import timing_cache_file

_GRACE = 5.0  # seconds that a cancelled build has to end by itself
_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_INSTALL = (
    f"install one of them: {install_command('rtx')} (TensorRT-RTX: builds for RTX GPUs, also on a machine without one) or "
    f"{install_command('trt')} (TensorRT: builds for the GPU of this machine)"
)


def choose_backend(
    targets: Sequence[str] | None = None, precision: Precision | None = None, backend: BackendName | None = None
) -> Backend:
    """Return full TensorRT where it is installed, a GPU is visible and no other target is asked for; else TensorRT-RTX.

    With a ``backend`` it is that one or none.

    Raises ``UsageError`` for a target that nothing builds for, or not in ``precision``; ``Unavailable`` where neither is
    installed, or what is installed cannot build for these targets here.
    """
    local = cuda.local_target()
    wanted = tuple(dict.fromkeys(target.lower() for target in targets or ()))
    unknown = [target for target in wanted if target not in TARGETS and target != local]
    if unknown:
        raise UsageError(
            f"unknown target {', '.join(unknown)}; valid targets are {', '.join(TARGETS)}{did_you_mean(unknown[0], TARGETS)}"
        )
    full, rtx = (backend in (None, name) and not missing([name]) for name in ("tensorrt", "tensorrt_rtx"))
    if full and local is not None and wanted in ((), (local,)):
        return Backend("tensorrt", (local,), ahead_of_time=False)
    if rtx:
        foreign = [target for target in wanted if target not in TARGETS]
        if foreign:
            raise Unavailable(f"TensorRT-RTX does not build for {', '.join(foreign)}; {_INSTALL}")
        if precision is not None:
            check_precision("trt", precision, wanted)
        return Backend("tensorrt_rtx", wanted or default_targets(precision), ahead_of_time=True)
    if not full and backend is not None:
        extra = "trt" if backend == "tensorrt" else "rtx"
        raise Unavailable(f"{_NAMES[backend]} is not installed; install it: {install_command(extra)}")
    if not full:
        raise Unavailable(f"neither tensorrt nor tensorrt_rtx is installed; {_INSTALL}")
    here = f"only for this machine's {local}" if local else "nothing on a machine without a GPU"
    raise Unavailable(f"tensorrt is installed, but builds {here}; for RTX GPUs elsewhere: {install_command('rtx')}")


def check_settings(backend: Backend, settings: BuildSettings) -> None:
    """Raise ``Unavailable`` where ``backend`` cannot build with these ``settings`` on this machine."""
    if settings.flags and cuda.local_target() is None:
        asked = "--strip-weights" if settings.strip_weights else "--refit"
        raise Unavailable(
            f"{asked}: {_NAMES[backend.name]} needs a GPU to build an engine that can be refitted, and here is no CUDA driver "
            "or no visible GPU",
            next_step="run this on a machine with the engine's GPU, or leave it out here and give it to export.build there, "
            "with the bundle's recipe.json",
        )


def build(onnx_path: Path, output_dir: Path, facts: OnnxFacts, options: BuildOptions) -> EngineResult:
    """Build one engine per target, each in its own process; see ``export.engines.build.build_engine``."""
    backend = choose_backend(options.targets, options.precision, options.backend)
    settings = options.builder_settings
    check_settings(backend, settings)
    built = build_files(onnx_path, output_dir, facts, backend, options)
    done, files = built.done, built.files
    weights = onnx_path if settings.strip_weights else None
    executed, reason = _try(dict(zip(backend.targets, files, strict=True)), backend, facts, options.batch, weights)
    return EngineResult(
        backend=backend.name,
        version=built.version,
        targets=list(backend.targets),
        precision=options.precision,
        batch=options.batch,
        files=files,
        layers_file=built.layers_file,
        attentions=len(facts.attentions),
        executed=executed,
        reason=reason,
        kernels={target: outcome["kernels"] for target, outcome in done.items() if "kernels" in outcome},
        fused={target: outcome["fused_attentions"] for target, outcome in done.items() if "fused_attentions" in outcome},
        narrow={target: outcome["narrow_share"] for target, outcome in done.items() if outcome.get("narrow_share") is not None},
        quantised=facts.quantised,
        seconds={target: round(outcome["seconds"], 2) for target, outcome in done.items()},
        settings={"BuilderFlag": settings.flags} if settings.flags else {},
        weights=weights,
    )


@dataclass(frozen=True)
class Built:
    """Engine files, one per target in the backend's order, the list of their layers, and what each build reported."""

    files: list[Path]
    layers_file: Path | None
    done: dict[str, dict[str, Any]]

    @property
    def version(self) -> str:
        """Of TensorRT or TensorRT-RTX."""
        return str(next(iter(self.done.values()))["version"])


def build_files(onnx_path: Path, output_dir: Path, facts: OnnxFacts, backend: Backend, options: BuildOptions) -> Built:
    """Build one engine per target of ``backend``, each in its own process, without running any: all of them, or none."""
    output_dir.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, Any]] = {}
    layers: dict[str, Any] = {}
    settings = options.builder_settings
    timing = _timing_cache(backend, options)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".engines-") as staging:
        for target in backend.targets:
            work = Path(staging) / target
            work.mkdir()
            request = BuildRequest(
                backend=backend.name,
                onnx=str(onnx_path.resolve()),
                engine=str(work / "engine"),
                layers=str(work / "layers.json"),
                target=target if backend.ahead_of_time else None,
                precision=options.precision,
                input_name=facts.input_name,
                image_shape=facts.image_shape,
                profiles=[] if facts.fixed_batch else [list(profile) for profile in options.every_profile],
                attentions=facts.attentions,
                tf32=settings.tf32,
                workspace=settings.workspace,
                optimization_level=settings.optimization_level,
                flags=settings.flags,
                timing=None if timing is None else str(work / "timing"),
            )
            done[target] = _run_with_times(request, work, target, options.progress, timing)
            if (work / "layers.json").is_file():
                layers[target] = json.loads((work / "layers.json").read_text())
        # Nothing reaches its final name before every target is built.
        files = [output_dir / f"{onnx_path.stem}.{target}.engine" for target in backend.targets]
        for target, path in zip(backend.targets, files, strict=True):
            (Path(staging) / target / "engine").replace(path)
        layers_file = output_dir / "engine_layers.json" if layers else None
        if layers_file:
            part = Path(staging) / "engine_layers.json"
            part.write_text(json.dumps(layers, indent=1) + "\n")
            part.replace(layers_file)
    return Built(files, layers_file, done)


def _timing_cache(backend: Backend, options: BuildOptions) -> Path | None:
    """Where the times of kernels are kept: full TensorRT measures them on this GPU, TensorRT-RTX measures none."""
    if options.cache is None or backend.name != "tensorrt":
        return None
    version = next((package.version for package in PACKAGES if package.module == backend.name), None)
    return timing_cache_file(options.cache, backend.name, version or "unknown")


def _run_with_times(
    request: BuildRequest, work: Path, target: str, progress: BuildProgressCallback, timing: Path | None
) -> dict[str, Any]:
    """``_run_worker`` with the times that are kept in the file ``timing``, which those of this build are added to."""
    if timing is None:
        return _run_worker(request, work, target, progress)
    known = kept_blob(timing)
    (work / "timing").write_bytes(known or b"")
    done = _run_worker(request, work, target, progress)
    if known and not done["timing"]:
        warn_of_dropped(timing, "TensorRT does not take it here")
    keep_blob(timing, (work / "timing").read_bytes())
    return done


def _run_worker(request: BuildRequest, work: Path, target: str, progress: BuildProgressCallback) -> dict[str, Any]:
    """Run one build process to its end; kill it on any way out, Ctrl-C included."""
    request.write(work / "request.json")
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with (work / "log.txt").open("w+") as log:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "export.engines.tensorrt_worker", str(work / "request.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the build
        )
        try:
            outcome = _follow(worker, target, progress)
            worker.wait()
        finally:
            _end(worker)
        log.seek(0)
        tail = " | ".join(log.read().strip().splitlines()[-5:])
    name, onnx = _NAMES[request.backend], Path(request.onnx).name
    if outcome["event"] == "done":
        return outcome
    if outcome["event"] == "failed" and outcome["kind"] == "rejected":
        raise InputRejected(f"{onnx}: {name} cannot read it: {outcome['message']}")
    if outcome["event"] == "failed":
        raise Unavailable(f"{onnx}: {name} did not build it for {target}: {outcome['message']}")
    code = worker.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    raise Unavailable(f"{onnx}: the {name} build for {target} {how}; last messages: {tail or 'none'}")


def _follow(worker: subprocess.Popen[str], target: str, progress: BuildProgressCallback) -> dict[str, Any]:
    assert worker.stdout is not None
    for line in worker.stdout:
        report: dict[str, Any] = json.loads(line)
        if report["event"] in ("done", "failed"):
            return report
        if progress(BuildProgress(target, report["phase"], report["parent"], report["step"], report["total"])) is False:
            raise KeyboardInterrupt
    return {"event": "died"}


def _end(worker: subprocess.Popen[str]) -> None:
    if worker.poll() is None:
        assert worker.stdin is not None
        with contextlib.suppress(OSError):
            worker.stdin.close()  # asks TensorRT to stop at its next step
        try:
            worker.wait(_GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            worker.kill()
            worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _try(engines: dict[str, Path], backend: Backend, facts: OnnxFacts, batch: Batch, weights: Path | None) -> tuple[bool, str]:
    """Run this machine's engine once on blank images; return whether it ran, and else the reason."""
    from patchslim.tensorrt_runner import TrtRunner, can_execute

    local = cuda.local_target()
    able, reason = can_execute(backend.name, list(engines))
    target = target_for(local, engines)
    if not able or target is None:
        return False, reason
    import numpy as np

    try:
        runner = TrtRunner(engines[target], backend.name, weights=weights)
        try:
            runner.infer(np.zeros((batch[0], *facts.image_shape), dtype=np.float32))
        finally:
            runner.close()
    except (InputRejected, Unavailable) as error:
        return False, str(error)
    others = [other for other in engines if other != target]
    return not others, f"only {target} ran here" if others else ""
