"""A bundle measured on images of one's own: top-1 and top-5 of its models, against its own top-1 and against gates."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import EXIT_PARITY
from patchslim.intervals import proportion_interval
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.runner import infer_in_batches
from validate.attestation import DeviceImages
from validate.built_engine import read_build
from validate.engine_checks import Running
from validate.engine_runs import BACKENDS, EngineRun, OnnxWeights, Subject
from validate.images import batches, list_images
from validate.manifest import Manifest
from validate.parity import rung
from validate.parity_records import Rung
from validate.verdict import Check


@dataclasses.dataclass(frozen=True)
class ImageGates:
    """What a bundle must reach on images: ``min_top1`` percent, and at most ``max_top1_drop`` points below its own top-1."""

    min_top1: float | None = None
    max_top1_drop: float | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What images showed: a rung and a check for every run of a model, in their order, and what was noted of the images."""

    rungs: list[Rung]
    checks: list[Check]
    notes: list[Check]
    images: DeviceImages


def measure(
    bundle: tuple[Path, Manifest], images: Path, gates: ImageGates, how: Running, runs: Sequence[EngineRun], batch: int = 8
) -> Measured:
    """Top-1 and top-5 over a folder of images of every model in every engine of ``runs``, and what ``gates`` say of them.

    ``bundle`` is its folder and manifest. Drop, agreement and errors are against the first of the runs. Raises
    ``InputRejected`` for images that do not fit the bundle or cannot be read, and where a model exceeds its limits.
    """
    folder, manifest = bundle
    listed = list_images(images, manifest)
    logits: list[list[Array]] = [[] for _ in runs]
    parts: list[Array] = []
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(how.open(_subject(run, folder, manifest, how))) for run in runs]
        for tensors, classes in batches(listed.images, manifest.preprocessing, batch):
            parts.append(classes)
            for runner, answers in zip(runners, logits, strict=True):
                runner.renew()
                answers.append(infer_in_batches(runner, tensors, batch))
    targets, first = np.concatenate(parts), np.concatenate(logits[0])
    stages = [_stage(run, manifest) for run in runs]
    rungs, checks = [], []
    for index, (run, stage, answers) in enumerate(zip(runs, stages, logits, strict=True)):
        reference = (first, first) if index else (None, None)
        found = rung(stage, np.concatenate(answers), targets, *reference, compared_to=stages[0] if index else None)
        check = _judged(found, run, manifest, gates)
        checks.append(check)
        rungs.append(found.model_copy(update={"status": check.status, "note": check.detail}))
    notes = [Check(name="images", subject=str(images), status="passed", detail=note) for note in listed.notes]
    seen = DeviceImages(folder=str(images)[-4096:], images=len(targets), classes=len(np.unique(targets)))
    return Measured(rungs, checks, notes, seen)


def _subject(run: EngineRun, folder: Path, manifest: Manifest, how: Running) -> Subject:
    built = how.choice.built
    if run.recipe_sha256 is None or built is None:
        own = next((one for one in manifest.engines_by_stage.values() if run.file in one.files), None)
        settings = OpenVinoSettings.of_record({} if own is None else own.settings)
        weights = None if own is None else OnnxWeights.of_engine(own, folder, manifest)
        return Subject(run.engine, folder, run.file, manifest.files, openvino=settings, weights=weights)
    record = read_build(built)
    weights = OnnxWeights.of_engine(record.engine, folder, manifest)
    return Subject(run.engine, built, run.file, record.files, run.recipe_sha256, weights=weights)


def _stage(run: EngineRun, manifest: Manifest) -> str:
    engines = [stage for stage, one in manifest.engines_by_stage.items() if run.file in one.files]
    return next((record.stage for record in manifest.onnx if record.path == run.file), next(iter(engines), "engine"))


def _judged(found: Rung, run: EngineRun, manifest: Manifest, gates: ImageGates) -> Check:
    """Whether the top-1 that was ``found`` meets the ``gates``; exactly as much as a gate asks for passes."""
    right = round((found.top1 or 0.0) * found.images / 100)
    top1 = Fraction(100 * right, found.images)
    low, high = proportion_interval(right, found.images)
    said = [f"top-1 {float(top1):.2f} % of {found.images} images here, 95 % CI {low:.2f} to {high:.2f}"]
    own = next((one.top1 for one in manifest.rungs if one.stage == found.stage and one.top1 is not None), None)
    own = own if own is not None else next((one.top1 for one in manifest.rungs[1:] if one.top1 is not None), None)
    if own is not None:
        said.append(f"the bundle says {own:.2f} % of {manifest.evaluation.images} images")
    faults = []
    if found.non_finite:
        faults.append(f"{found.non_finite} logits are NaN or infinite")
    if gates.min_top1 is not None and top1 < Fraction(repr(float(gates.min_top1))):
        faults.append(f"less than --min-top1 {gates.min_top1:g}")
    if gates.max_top1_drop is not None:
        limit = Fraction(repr(float(gates.max_top1_drop)))
        if own is None:
            faults.append("--max-top1-drop has nothing to compare with: the bundle was measured on images without labels")
        elif Fraction(repr(own)) - top1 > limit + Fraction(1, 10**9):  # the bundle's own is written as a float
            faults.append(f"{own - float(top1):.2f} points less, more than --max-top1-drop {gates.max_top1_drop:g}")
    asked = [points for points in (gates.max_top1_drop,) if points is not None]
    if any(100 / found.images > points for points in asked) or (gates.min_top1 is not None and found.images == 1):
        said.append(f"one image of {found.images} decides this gate alone: it proves nothing")
    return Check(
        name="images" if run.engine == "ort" else f"images, {BACKENDS[run.engine]}",
        subject=run.file,
        status="failed" if faults else "passed",
        detail="; ".join(said + faults),
        exit_code=EXIT_PARITY if faults else 0,
    )
