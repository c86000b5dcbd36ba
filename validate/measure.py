"""A bundle measured on images of one's own: top-1 and top-5 of its ONNX files, against its own top-1 and against gates."""

from __future__ import annotations

import contextlib
import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import EXIT_PARITY
from patchslim.intervals import proportion_interval
from patchslim.ort_runner import CPU
from patchslim.runner import infer_in_batches
from validate.images import batches, list_images
from validate.isolated import IsolatedRunner, Limits
from validate.manifest import Manifest, Rung
from validate.parity import rung
from validate.verdict import Check


@dataclasses.dataclass(frozen=True)
class ImageGates:
    """What a bundle must reach on images: ``min_top1`` percent, and at most ``max_top1_drop`` points below its own top-1."""

    min_top1: float | None = None
    max_top1_drop: float | None = None


def measure(
    folder: Path,
    manifest: Manifest,
    images: Path,
    gates: ImageGates,
    *,
    batch: int = 8,
    provider: str = CPU,
    threads: int = 0,
    limits: Limits | None = None,
) -> tuple[list[Rung], list[Check]]:
    """Top-1 and top-5 over a folder of images of every ONNX file that runs in ONNX Runtime, and what ``gates`` say of them.

    Drop, agreement and errors are against the first of the files. Raises ``InputRejected`` for images that do not fit the
    bundle or cannot be read, and where a model exceeds its ``limits``.
    """
    listed = list_images(images, manifest)
    records = [record for record in manifest.onnx if record.max_error is not None]
    logits: list[list[Array]] = [[] for _ in records]
    parts: list[Array] = []
    with contextlib.ExitStack() as stack:
        runners = [
            stack.enter_context(
                IsolatedRunner(folder, manifest, record.path, limits or Limits(), provider=provider, threads=threads)
            )
            for record in records
        ]
        for tensors, classes in batches(listed.images, manifest.preprocessing, batch):
            parts.append(classes)
            for runner, answers in zip(runners, logits, strict=True):
                runner.renew()
                answers.append(infer_in_batches(runner, tensors, batch))
    targets, first = np.concatenate(parts), np.concatenate(logits[0])
    rungs, checks = [], [Check(name="images", subject=str(images), status="passed", detail=note) for note in listed.notes]
    for index, (record, answers) in enumerate(zip(records, logits, strict=True)):
        reference = (first, first) if index else (None, None)
        found = rung(
            record.stage,
            np.concatenate(answers),
            targets,
            *reference,
            compared_to=records[0].stage if index else None,
        )
        check = _judged(found, record.path, manifest, gates)
        checks.append(check)
        rungs.append(found.model_copy(update={"status": check.status, "note": check.detail}))
    return rungs, checks


def _judged(found: Rung, path: str, manifest: Manifest, gates: ImageGates) -> Check:
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
        name="images",
        subject=path,
        status="failed" if faults else "passed",
        detail="; ".join(said + faults),
        exit_code=EXIT_PARITY if faults else 0,
    )
