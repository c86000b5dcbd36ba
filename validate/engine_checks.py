"""A bundle's models in the engines of this machine: what they answer the golden inputs, and how long they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from patchslim import cuda
from patchslim.choices import Precision
from patchslim.errors import EXIT_PARITY, InputRejected, Unavailable
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.ort_runner import CPU
from patchslim.runner import infer_in_batches
from patchslim.targets import target_for
from validate.built_engine import BuildRecord, read_build
from validate.engine_runs import (
    BACKENDS,
    ON_ONNX,
    EngineChoice,
    EngineKey,
    EngineRun,
    GoldenParity,
    OnnxWeights,
    Subject,
    version_of,
    why_not,
)
from validate.golden import Golden
from validate.isolated import IsolatedRunner, Limits
from validate.latency_sweep import sweep
from validate.manifest import Manifest, OnnxRecord
from validate.parity import MIN_AGREEMENT, TOLERANCES, logit_tolerance, rung
from validate.verdict import Check, failed

_CHUNK = 8  # images per run of a model with a free batch axis


@dataclasses.dataclass(frozen=True)
class Running:
    """How models are run: in which engines, within which limits, by which of ONNX Runtime's providers (None: the CPU's)."""

    choice: EngineChoice = dataclasses.field(default_factory=EngineChoice)
    limits: Limits = dataclasses.field(default_factory=Limits)
    provider: str | None = None
    threads: int = 0

    def open(self, subject: Subject) -> IsolatedRunner:
        """``subject``, ready to run in a process of its own; raises as ``IsolatedRunner`` does."""
        return IsolatedRunner(
            subject.folder,
            subject,
            subject.path,
            self.limits,
            provider=self.provider or CPU if subject.engine == "ort" else CPU,
            threads=self.threads,
            backend=BACKENDS[subject.engine],
            openvino=self.choice.told(subject),
            weights=subject.weights,
        )

    def place(self, subject: Subject) -> str:
        """What ``subject`` runs on: an execution provider, a processor with its precision, a GPU generation."""
        if subject.engine == "ort":
            return self.provider or CPU
        if subject.engine != "openvino":
            return cuda.local_target() or "no GPU"
        told = self.choice.told(subject)
        return f"CPU, {told.precision}" + (", throughput" if told.hint == "throughput" else "")


@dataclasses.dataclass(frozen=True)
class Expected:
    """How near to the slim model's logits a file's answers to the golden inputs must be."""

    max_error: float
    min_agreement: float

    @classmethod
    def of_record(cls, record: OnnxRecord) -> Expected:
        """What a manifest says of an ONNX file that runs in ONNX Runtime."""
        assert record.max_error is not None
        return cls(record.max_error, record.min_agreement)

    @classmethod
    def of_engine(cls, precision: str, golden: Golden) -> Expected:
        """What an engine of this precision must answer, as an export would ask for; FP16's for one that is not known."""
        known: Precision = next((one for one in TOLERANCES if one == precision), "fp16")
        return cls(logit_tolerance(known, golden.slim_logits), MIN_AGREEMENT[known])


@dataclasses.dataclass(frozen=True)
class Trial:
    """A bundle whose models are run: what each came to is added to ``runs``."""

    folder: Path
    manifest: Manifest
    golden: Golden
    how: Running
    runs: list[EngineRun]

    def run(
        self, subject: Subject, expected: Expected, look: Callable[[IsolatedRunner], None] = lambda runner: None
    ) -> EngineRun:
        """Run the golden inputs through ``subject``, after a ``look`` at it, and time it where that is asked for.

        Raises ``InputRejected`` where it is not what it should be or does not run, ``Unavailable`` as ``IsolatedRunner`` does.
        """
        with self.how.open(subject) as runner:
            look(runner)
            logits = infer_in_batches(runner, self.golden.inputs, _CHUNK)
            if logits.shape[1] != self.manifest.classes:
                raise InputRejected(f"{runner.name}: answers {logits.shape[1]} classes, not {self.manifest.classes}")
            golden = self._parity(logits, expected)
            latency = []
            if self.how.choice.latency and golden.passed and self._is_timed(subject):
                latency = sweep(runner, self.how.choice.latency, "wall" if subject.engine in ON_ONNX else "gpu")
        found = EngineRun(
            engine=subject.engine,
            version=version_of(subject.engine),
            on=self.how.place(subject),
            threads=self.how.threads,
            file=subject.path,
            sha256=subject.sha256,
            recipe_sha256=subject.recipe_sha256,
            status="passed" if golden.passed else "failed",
            detail=golden.described(),
            golden=golden,
            latency=latency,
        )
        self.runs.append(found)
        return found

    def _parity(self, logits: np.ndarray, expected: Expected) -> GoldenParity:
        slim = self.golden.slim_logits
        measured = rung("golden", logits, None, slim, slim, compared_to="pytorch-slim", tolerance=expected.max_error)
        return GoldenParity(
            images=measured.images,
            non_finite=measured.non_finite,
            max_error=None if measured.non_finite else measured.max_error,
            tolerance=expected.max_error,
            agreement=measured.agreement or 0.0,
            min_agreement=expected.min_agreement,
        )

    def _is_timed(self, subject: Subject) -> bool:
        """Of ONNX files the one that is served: FP16 where that is what ONNX Runtime serves, else FP32; of IRs all."""
        if subject.engine not in ON_ONNX or subject.path.endswith(".xml"):
            return True
        if (one := self.manifest.bundled(BACKENDS["ort"])) is not None:
            return subject.path == one.onnx
        records = [record for record in self.manifest.onnx if record.max_error is not None]
        half = self.manifest.engine.backend == BACKENDS["ort"] and self.manifest.precision == "fp16"
        served = next((record for record in records if record.stage.endswith("fp16") == half), records[0])
        return subject.path == served.path


def check_engines(trial: Trial, say: Callable[[str], None]) -> Iterator[Check]:
    """The bundle's models in every engine of the choice beside ONNX Runtime, and what of them cannot run here.

    An engine that was not asked for by name, and cannot take a model, is no fault of the bundle. Raises ``Unavailable`` where
    one that was asked for is not here, or has nothing of this bundle to run; ``InputRejected`` where it cannot take the model,
    and for a built engine's folder that is none.
    """
    choice = trial.how.choice
    built = None if choice.built is None else read_build(choice.built)
    for key in choice.beside_onnxruntime():
        found = list(_subjects(trial, key, built))
        if not found and choice.keys is not None:
            raise Unavailable(f"--engine {key}: neither the bundle nor a build has an engine of it for {cuda.local_target()}")
        for subject, expected in found:
            say(f"{subject.path}, {BACKENDS[key]}")
            yield _checked(trial, subject, expected)
    if choice.keys is None:
        yield from _idle(trial, built)


def _subjects(trial: Trial, key: EngineKey, built: BuildRecord | None) -> Iterator[tuple[Subject, Expected]]:
    """What of the bundle, or of what was built of it, an engine runs on this machine, and what that must answer."""
    manifest, local = trial.manifest, cuda.local_target()
    engines = [one for one in manifest.engines_by_stage.values() if one.backend == BACKENDS[key] and one.files]
    if key in ON_ONNX:
        for record in manifest.onnx:
            if record.max_error is not None:
                yield Subject(key, trial.folder, record.path, manifest.files), Expected.of_record(record)
        for engine in engines if key == "openvino" else []:
            settings = OpenVinoSettings.of_record(engine.settings)
            subject = Subject(key, trial.folder, engine.files[0], manifest.files, openvino=settings)
            yield subject, Expected.of_engine(engine.precision, trial.golden)
    elif built is not None and trial.how.choice.built is not None:
        file = None if local is None else built.engine_for(local)
        if file is not None and built.engine.backend == BACKENDS[key]:
            weights = OnnxWeights.of_engine(built.engine, trial.folder, manifest)
            subject = Subject(key, trial.how.choice.built, file.path, built.files, built.recipe_sha256, weights=weights)
            yield subject, Expected.of_engine(built.engine.precision, trial.golden)
    else:
        for engine in engines:
            if (target := target_for(local, engine.targets)) and len(engine.files) == len(engine.targets):
                path = engine.files[engine.targets.index(target)]
                weights = OnnxWeights.of_engine(engine, trial.folder, manifest)
                subject = Subject(key, trial.folder, path, manifest.files, weights=weights)
                yield subject, Expected.of_engine(engine.precision, trial.golden)


def _checked(trial: Trial, subject: Subject, expected: Expected) -> Check:
    name = f"golden parity, {BACKENDS[subject.engine]}"
    try:
        found = trial.run(subject, expected)
    except (InputRejected, Unavailable) as error:
        if trial.how.choice.keys is not None:
            raise
        return Check(name=name, subject=subject.path, status="not executed", detail=str(error))
    return judged(name, subject, found)


def judged(name: str, subject: Subject, found: EngineRun) -> Check:
    """The check that a run of the golden inputs is."""
    if found.status == "passed":
        return Check(name=name, subject=subject.path, status="passed", detail=found.detail)
    return failed(name, subject.path, f"{subject.folder / subject.path}: {found.detail}", EXIT_PARITY)


def _idle(trial: Trial, built: BuildRecord | None) -> Iterator[Check]:
    """A line for each engine whose files nothing here can run."""
    local = cuda.local_target()
    for engine in trial.manifest.engines_by_stage.values() if built is None else [built.engine]:
        key = next((key for key, backend in BACKENDS.items() if backend == engine.backend and key != "ort"), None)
        if key is None:
            continue
        able = key in ON_ONNX or target_for(local, engine.targets) is not None
        if reason := why_not(key) or ("" if able else f"this machine's GPU is {local}"):
            detail = f"the engine for {', '.join(engine.targets)} did not run here: {reason}"
            name = f"golden parity, {BACKENDS[key]}"
            yield Check(name=name, subject=", ".join(engine.files), status="not executed", detail=detail)
