"""The arithmetic of parity: accuracy, agreement, logit errors and the gate. NumPy alone."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from patchslim.arrays import Array
from patchslim.choices import Precision
from patchslim.intervals import drop_interval, images_needed
from validate.fields import GateRule
from validate.parity_records import Rung, ladder_passed

#: Largest difference of a logit that a stage may show, by its precision, as a fraction of the largest logit (of 1 where that
#: is smaller). FP16 keeps 11 bits of each value, bfloat16 8: its rounding errors, and so its bound, are 2^3 times FP16's. INT8
#: rounds to a 255th of a tensor's whole range and FP8 keeps 4 bits, from which no bound on a logit follows: a quantisation is
#: judged by its top-1, as slimming is, and this bound is for an engine that answers nonsense.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2, "int8": 1.0, "fp8": 1.0}
#: Percent of images on which a graph must have float32's top-1, by its precision: fewer bits may turn near ties.
MIN_AGREEMENT: dict[Precision, float] = {"fp32": 100.0, "fp16": 90.0, "bf16": 90.0, "int8": 75.0, "fp8": 75.0}


def logit_tolerance(precision: Precision, logits: Array) -> float:
    """Largest difference of a logit that ``precision`` may show, for a model that answers ``logits`` in float32.

    For fp32 that is the difference of one program from another.
    """
    return TOLERANCES[precision] * _scale(logits)


def stage_precision(stage: str, engine: str = "") -> Precision:
    """The precision by which a stage is judged: that of its name, or of the ``engine`` where it is one; else FP16."""
    if stage in ("pytorch", "pytorch-slim", "onnx-slim", "onnx-slim-split", "onnx-slim-packed"):
        return "fp32"
    named = engine if stage.startswith("engine") else stage.rpartition("-")[2]
    return next((one for one in TOLERANCES if one == named and one != "fp32"), "fp16")


def _scale(logits: Array) -> float:
    """The largest finite logit, by its absolute value, or 1 where none is above that."""
    finite = np.abs(logits[np.isfinite(logits)])
    return max(1.0, float(finite.max(initial=0.0)))


def rung(
    stage: str,
    logits: Array,
    targets: Array | None = None,
    original_logits: Array | None = None,
    reference_logits: Array | None = None,
    *,
    compared_to: str | None = None,
    tolerance: float | None = None,
    note: str = "",
) -> Rung:
    """Measure one stage; ``gate`` decides its status.

    ``logits``, ``original_logits`` and ``reference_logits`` are (n, classes); ``targets`` is (n,) class indices, None where the
    images have no labels. Without ``original_logits`` the stage is the original itself. ``reference_logits`` are those of
    the stage ``compared_to``, which the logit errors are against; ``tolerance`` is the largest error allowed, None where the
    difference is the slimming loss. An image with a NaN or infinite logit counts as answered wrongly and as disagreeing.
    Raises ``ValueError`` for shapes that do not fit.
    """
    logits = _matrix(logits, stage)
    n, classes = logits.shape
    original = logits if original_logits is None else _matrix(original_logits, "original_logits", logits.shape)
    if (reference_logits is None) != (compared_to is None):
        raise ValueError("reference_logits and compared_to belong together")
    finite = np.isfinite(logits).all(axis=1)
    fields: dict[str, object] = {}
    if targets is not None:
        if targets.shape != (n,) or not np.issubdtype(targets.dtype, np.integer):
            raise ValueError(f"targets: must be {n} integers, not {targets.shape} {targets.dtype}")
        if n and not (targets.min() >= 0 and targets.max() < classes):
            raise ValueError(f"targets: must be in [0, {classes})")
        rank = target_rank(logits, targets)
        right = finite & (rank == 0)
        was_right = np.isfinite(original).all(axis=1) & (target_rank(original, targets) == 0)
        lost, gained = int((was_right & ~right).sum()), int((right & ~was_right).sum())
        fields |= {
            "top1": 100 * int(right.sum()) / n,
            "top5": 100 * int((finite & (rank < 5)).sum()) / n,
            "top1_drop": 100 * (lost - gained) / n,
            "lost": lost,
            "gained": gained,
            "drop_interval": None if original_logits is None else drop_interval(lost, gained, n),
        }
    same = finite & np.isfinite(original).all(axis=1) & (top1(logits) == top1(original))
    agreeing = int(same.sum())
    if reference_logits is not None:
        maximum, mean = logit_errors(logits, _matrix(reference_logits, "reference_logits", logits.shape))
        fields |= {"max_error": maximum, "mean_error": mean}
    fields |= {
        "stage": stage,
        "images": n,
        "agreement": 100 * agreeing / n,
        "agreeing": agreeing,
        "compared_to": compared_to,
        "tolerance": tolerance,
        "non_finite": int(logits.size - np.isfinite(logits).sum()),
        "note": note,
    }
    return Rung.model_validate(fields)


def not_executed(stage: str, note: str) -> Rung:
    """A rung for a stage that could not run here; ``note`` says why."""
    return Rung(stage=stage, images=0, status="not executed", note=note)


def top1(logits: Array) -> Array:
    """Index of the largest of (n, classes) logits, (n,); the lowest index wins a tie, NaN counts as minus infinity."""
    return np.asarray(np.argmax(np.where(np.isnan(logits), -np.inf, logits), axis=1))


def target_rank(logits: Array, targets: Array) -> Array:
    """How many classes come before the target's, (n,): a larger logit, or an equal one at a lower index.

    NaN counts as minus infinity.
    """
    clean = np.where(np.isnan(logits), -np.inf, logits)
    own = clean[np.arange(len(targets)), targets][:, None]
    earlier = np.arange(clean.shape[1])[None, :] < targets[:, None]
    return np.asarray(((clean > own) | ((clean == own) & earlier)).sum(axis=1))


def logit_errors(logits: Array, reference: Array) -> tuple[float | None, float | None]:
    """Largest and mean absolute difference over the images whose logits are finite on both sides; None where there is none."""
    finite = np.isfinite(logits).all(axis=1) & np.isfinite(reference).all(axis=1)
    if not finite.any():
        return None, None
    difference = np.abs(logits[finite].astype(np.float64) - reference[finite].astype(np.float64))
    return float(difference.max()), float(difference.mean())


def gate(rungs: Iterable[Rung], max_top1_drop: float, rule: GateRule = "point") -> tuple[list[Rung], bool]:
    """Decide the status of every rung, the original first, and of the whole ladder.

    A rung that ran fails when it has a NaN or infinite logit, when its top-1 is more than ``max_top1_drop`` points below the
    original's (exactly as many passes), when its ``max_error`` exceeds its ``tolerance``, or when its answers depend on the
    batch by more than they may. Without labels the share of images that disagree with the original is gated instead: the drop
    cannot be larger. By the rule ``confidence`` the whole 95 % interval of the drop must be within ``max_top1_drop``; the rung
    fails where all of it is above, and is undecided where it is on both sides.
    """
    judged = [_judge(one, max_top1_drop, "point" if not index else rule) for index, one in enumerate(rungs)]
    return judged, ladder_passed(judged)


def _judge(one: Rung, max_top1_drop: float, rule: GateRule) -> Rung:
    if not one.images:
        return one.model_copy(update={"status": "not executed"})
    faults = []
    if one.non_finite:
        faults.append(f"{one.non_finite} logits are NaN or infinite")
    doubt = ""
    if rule == "point":
        faults += _drop_fault(one, max_top1_drop)
    else:
        low, high = drop_interval(*one.changed, one.images)
        if low > max_top1_drop:
            faults.append(f"top-1 drops by {low:.3f} to {high:.3f} points (95 % CI), more than {max_top1_drop:g}")
        elif high > max_top1_drop:
            doubt = f"top-1 drops by {low:.3f} to {high:.3f} points (95 % CI), on both sides of {max_top1_drop:g}: "
            doubt += images_to_decide(one, max_top1_drop)
    if one.tolerance is not None:
        if one.max_error is None:
            faults.append(f"no finite logits to compare with {one.compared_to}")
        elif one.max_error > one.tolerance:
            faults.append(f"max logit error {one.max_error:.3g} against {one.compared_to}, more than {one.tolerance:.3g}")
    if (batches := one.batches) is not None and (batches.max_error is None or batches.max_error > batches.tolerance):
        found = "not finite" if batches.max_error is None else f"{batches.max_error:.3g} off, more than {batches.tolerance:.3g}"
        faults.append(f"answers depend on the batch: in batches of {', '.join(map(str, batches.sizes))} logits are {found}")
    status = "failed" if faults else "undecided" if doubt else "passed"
    notes = [note for note in (one.note, *faults, doubt) if note]
    return one.model_copy(update={"status": status, "note": "; ".join(notes)})


def _drop_fault(one: Rung, max_top1_drop: float) -> list[str]:
    limit = Fraction(repr(float(max_top1_drop)))  # 0.2 means one fifth, not the binary float just above it
    drop = one.exact_drop()
    if drop is not None and drop > limit:
        return [f"top-1 drops by {float(drop):.3f} points, more than {max_top1_drop:g}"]
    if drop is None and one.agreeing is not None and Fraction(100 * (one.images - one.agreeing), one.images) > limit:
        return [f"no labels, and top-1 disagrees with the original on more than {max_top1_drop:g} % of the images"]
    return []


def images_to_decide(one: Rung, max_top1_drop: float) -> str:
    """How many images would tell the drop of a rung from the gate, if the models differ on as many of them."""
    lost, gained = one.changed
    needed = images_needed(lost, gained, one.images, abs(max_top1_drop - 100 * (lost - gained) / one.images))
    return "no number of images settles a drop that is the gate" if needed is None else f"about {needed} images would settle it"


def _matrix(array: Array, name: str, shape: tuple[int, ...] | None = None) -> Array:
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name}: logits must be (images, classes) and not empty, not {array.shape}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: logits are {array.shape}, not {shape}")
    return array
