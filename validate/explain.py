"""A ladder of stages in words: what its verdict rests on, and which stage lost what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from patchslim.intervals import drop_interval, images_needed
from validate.fields import GateRule
from validate.parity_records import Comparison, Rung


def what_it_proves(rungs: Sequence[Rung], max_top1_drop: float, rule: GateRule = "point") -> list[str]:
    """What a verdict rests on, a sentence each: the worst drop with its interval, and whether so few images can tell.

    The original is the first of ``rungs``. Without labels images that disagree with it count as lost.
    """
    ran = [(one.changed, one) for one in rungs[1:] if one.images]
    asked = "gate: at most" if rule == "point" else "gate: with 95 % confidence at most"
    if not ran:
        return [f"{asked} {max_top1_drop:g} points of top-1 lost; no stage after the original was run"]
    (lost, gained), worst = max(ran, key=lambda each: each[0][0] - each[0][1])
    images, one_image = worst.images, 100 / worst.images
    low, high = drop_interval(lost, gained, images)
    said = [
        f"{asked} {max_top1_drop:g} points of top-1 lost; {worst.stage} lost {100 * (lost - gained) / images:.2f} "
        f"on {images} images, 95 % CI {low:.2f} to {high:.2f}"
    ]
    needed = images_needed(lost, gained, images, max_top1_drop)
    others = f"no number of images resolves {max_top1_drop:g} points" if needed is None else f"about {needed} could"
    if one_image > max_top1_drop:
        said.append(f"one image of {images} is {one_image:.3g} points and decides this gate alone: it proves nothing; {others}")
    elif high > max_top1_drop:
        said.append(f"{images} images cannot tell this from a drop above the gate; {others}")
    return said


def verdict_of(rungs: Sequence[Rung]) -> str:
    """Why a ladder did not pass, said once: what is wrong with the first stage that stopped, and what more with those after it.

    A stage that only carries on the drop of the first is named, and its drop not said again. "" where every stage passed.
    """
    stopped = [one for one in rungs if one.status in ("failed", "undecided")]
    if not stopped:
        return ""
    first, made_from = stopped[0], {one.stage: one.compared_to for one in rungs}
    carried = [
        one.stage
        for one in stopped[1:]
        if _only_drops(one) and _only_drops(first) and _made_from(one.stage, first.stage, made_from)
    ]
    said = f"{first.stage}: {first.note}"
    if carried:
        said += f" ({' and '.join(carried)}, made from it, {'drops' if len(carried) == 1 else 'drop'} with it)"
    return "; ".join([said, *(f"{one.stage}: {one.note}" for one in stopped[1:] if one.stage not in carried)])


def _made_from(stage: str, first: str, made_from: Mapping[str, str | None]) -> bool:
    """Whether ``stage`` was made from ``first``, directly or not; so is what does not say what it was compared with."""
    before = made_from[stage]
    if before is None:
        return True
    for _ in made_from:  # no further, should they go round
        if before == first:
            return True
        before = made_from.get(before or "")
    return False


def _only_drops(one: Rung) -> bool:
    """Whether nothing is wrong with a stage that stopped but its drop."""
    far = one.tolerance is not None and (one.max_error is None or one.max_error > one.tolerance)
    batches = one.batches
    batched = batches is not None and (batches.max_error is None or batches.max_error > batches.tolerance)
    return not (one.non_finite or far or batched)


@dataclasses.dataclass(frozen=True)
class Blame:
    """What a stage lost against the one that it was made from: points of top-1 (of agreement without labels), logits."""

    stage: str
    before: str
    points: float
    max_error: float | None


def blame(rungs: Sequence[Rung]) -> list[Blame]:
    """Which stage lost what; points that a stage gained are negative, and those on the way to a stage add up to its drop.

    What a stage was made from is what it was compared with, or the stage before it.
    """
    found, ran, before = [], {rungs[0].stage: rungs[0]}, rungs[0]
    for one in rungs[1:]:
        if one.images:
            before = ran.get(one.compared_to or "", before)
            points = _drop(one) - (0.0 if before is rungs[0] else _drop(before))
            found.append(Blame(one.stage, before.stage, points, one.max_error))
            before = ran[one.stage] = one
    return found


def _drop(one: Rung) -> float:
    lost, gained = one.changed
    return 100 * (lost - gained) / one.images


def compared(found: Comparison) -> str:
    """A comparison in one line."""
    candidate, original = found.candidate, found.original
    parts = []
    if found.mcnemar is not None:
        parts.append(f"McNemar p = {found.mcnemar:.2g}")
    if candidate.calibration_error is not None and original.calibration_error is not None:
        parts.append(f"calibration error {original.calibration_error:.1f} -> {candidate.calibration_error:.1f} %")
    if found.classes:
        worst = found.classes[0]
        if worst.candidate < worst.original:
            parts.append(f"worst class {worst.label}: {worst.original} -> {worst.candidate} of {worst.images} right")
    if found.divergence is not None:
        parts.append(f"mean KL {found.divergence:.2g} nats")
    return f"{candidate.stage} against {original.stage}: {', '.join(parts)}"
