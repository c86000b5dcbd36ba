"""``open_runner``: a bundle as a classifier in this process, in the fastest engine of it that works here."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

from patchslim import cuda
from patchslim.arrays import Array
from patchslim.choices import PerformanceHint
from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.ort_runner import CPU
from patchslim.packages import missing
from patchslim.runner import BatchLimits, infer_in_batches
from patchslim.targets import target_for
from patchslim.work_folder import tensorrt_cache
from validate.bundle import load_manifest
from validate.engine_runs import BACKENDS, ON_ONNX, EngineKey, OnnxWeights, Subject, why_not
from validate.manifest import Manifest
from validate.model import Model, open_model
from validate.parity import stage_precision
from validate.parity_records import BundledEngine, EngineRecord

_CUDA = "CUDAExecutionProvider"
#: Images of a call that go into the engine at once: on a CPU few are fastest.
_BATCH = 8


class BundleRunner:
    """A bundle's model, ready to run: a ``Runner``, which threads may share. A ``with`` block gives its memory back at its end.

    ``engine`` is what it runs in, ``path`` the file of the bundle, ``image_shape`` (channels, height, width) what it takes.
    """

    def __init__(self, model: Model, subject: Subject, private: tempfile.TemporaryDirectory[str]) -> None:
        self.engine, self.path, self.name = subject.engine, subject.path, model.name
        self.image_shape, self.batch_limits = model.image_shape, (1, None)
        self._model, self._private = model, private
        self._batch = _BATCH * getattr(model, "at_once", 1)

    image_shape: tuple[int, int, int]
    batch_limits: BatchLimits

    def infer(self, images: Array) -> Array:
        """Return logits (b, classes) float32 for ``images`` (b, channels, height, width), prepared as the manifest says.

        Any number of images is taken. Raises ``InputRejected`` for images that do not fit.
        """
        if images.ndim != 4 or not len(images) or images.shape[1:] != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise InputRejected(f"{self.name}: takes images of shape (batch, {wanted}), not {images.shape}")
        return infer_in_batches(self._model, images, self._batch)

    def close(self) -> None:
        """Give the model's memory back; it cannot be run afterwards."""
        self._model.close()
        self._private.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def open_runner(
    bundle: Path | str, engine: EngineKey | None = None, threads: int | None = None, hint: PerformanceHint | None = None
) -> BundleRunner:
    """Open the fastest engine of ``bundle`` that works here: its own where that runs here, else OpenVINO, else ONNX Runtime.

    Of several, one for this machine's GPU comes before those for a CPU, and these come by the times that were measured where
    the bundle was made (``ms`` of ``engines`` in the manifest), which this machine need not share: those that were not timed
    come last, OpenVINO before ONNX Runtime. ``engine`` takes that one or none; ``threads`` None leaves their number to the
    engine; ``hint`` throughput has OpenVINO run several batches at once, None is what the manifest says.

    Exactly the bytes that the manifest has the digests of are loaded, into this process: check a stranger's bundle with
    ``check_bundle`` first. Raises ``InputRejected`` where the bundle is broken, ``Unavailable`` where nothing of it runs here,
    naming each reason, ``UsageError`` for an engine or a hint that does not exist or a number of threads below 1.
    """
    folder = Path(bundle)
    if engine is not None and engine not in BACKENDS:
        raise UsageError(f"engine {engine}: must be one of {', '.join(BACKENDS)}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads {threads}: must be at least 1, or None")
    if hint not in (None, *get_args(PerformanceHint)):
        raise UsageError(f"hint {hint}: must be one of {', '.join(get_args(PerformanceHint))}, or None")
    manifest, reasons = load_manifest(folder), list[str]()
    for subject in _subjects(folder, manifest):
        if hint is not None:
            subject = dataclasses.replace(subject, openvino=dataclasses.replace(subject.openvino, hint=hint))
        if engine not in (None, subject.engine):
            continue
        if reason := why_not(subject.engine):
            reasons.append(f"{subject.engine}: {reason}")
            continue
        for provider in _providers(subject.engine):
            try:
                return _opened(subject, provider, threads or 0)
            except Unavailable as error:
                reasons.append(f"{subject.engine}: {error}")
    if not reasons:
        reasons.append(f"it has no engine for {engine} and {cuda.local_target() or 'a machine without a GPU'}")
    raise Unavailable(f"{folder}: nothing of it runs here: {'; '.join(dict.fromkeys(reasons))}")


def _subjects(folder: Path, manifest: Manifest) -> Iterator[Subject]:
    """The files of a bundle and what each runs in, the fastest first."""
    for engine in fastest_first(manifest):
        yield from _engine_subjects(folder, manifest, engine)
    for key in reversed(ON_ONNX):
        yield Subject(key, folder, _served(manifest), manifest.files)


def fastest_first(manifest: Manifest) -> list[EngineRecord]:
    """The engines for a GPU, then those for a CPU by the times that the manifest has of them."""
    if not manifest.engines:
        return [manifest.engine]
    kinds = [BACKENDS["openvino"], BACKENDS["ort"]]

    def rank(one: BundledEngine) -> tuple[bool, float, int]:
        on_gpu = one.engine.backend not in kinds or (one.engine.backend == BACKENDS["ort"] and _has_cuda())
        slow = math.inf if one.ms is None else one.ms
        return not on_gpu, slow, kinds.index(one.engine.backend) if one.engine.backend in kinds else -1

    return [one.engine for one in sorted(manifest.engines, key=rank)]


def _served(manifest: Manifest) -> str:
    """The ONNX file that ONNX Runtime is to run, or of the bundle's precision; the first where none runs in that."""
    runnable = [record for record in manifest.onnx if record.max_error is not None]
    if (one := manifest.bundled(BACKENDS["ort"])) is not None:
        return one.onnx
    return next((one.path for one in runnable if stage_precision(one.stage) == manifest.precision), runnable[0].path)


def _engine_subjects(folder: Path, manifest: Manifest, engine: EngineRecord) -> Iterator[Subject]:
    key = next((key for key, backend in BACKENDS.items() if backend == engine.backend), None)
    target = target_for(cuda.local_target(), engine.targets)
    if key == "openvino" and engine.files:
        yield Subject(key, folder, engine.files[0], manifest.files, openvino=OpenVinoSettings.of_record(engine.settings))
    elif key == "ort":
        yield Subject(key, folder, _served(manifest), manifest.files)
    elif key is not None and target is not None and len(engine.files) == len(engine.targets):
        path, weights = engine.files[engine.targets.index(target)], OnnxWeights.of_engine(engine, folder, manifest)
        yield Subject(key, folder, path, manifest.files, weights=weights)


def _providers(engine: EngineKey) -> list[str]:
    return [*([_CUDA] if engine == "ort" and _has_cuda() else []), CPU]


def _has_cuda() -> bool:
    """Whether ONNX Runtime has its CUDA provider here, and a GPU for it."""
    if cuda.local_target() is None or missing([BACKENDS["ort"]]):
        return False
    import onnxruntime

    return _CUDA in onnxruntime.get_available_providers()


def _opened(subject: Subject, provider: str, threads: int) -> BundleRunner:
    private = tempfile.TemporaryDirectory(prefix="patchslim-runner-")
    try:
        model = open_model(
            {
                "folder": str(subject.folder),
                "path": subject.path,
                "files": [(file.path, file.size, file.sha256) for file in subject.files],
                "private": private.name,
                "provider": provider,
                "threads": threads,
                "backend": BACKENDS[subject.engine],
                "openvino": dataclasses.asdict(subject.openvino),
                "weights": None if subject.weights is None else subject.weights.listed(),
                "cache": tensorrt_cache(),
            }
        )
    except BaseException:
        private.cleanup()
        raise
    return BundleRunner(model, subject, private)
