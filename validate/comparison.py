"""Two models on the same images, image by image."""

from __future__ import annotations

import math

import numpy as np

from patchslim.arrays import Array
from validate.parity import target_rank, top1
from validate.parity_records import Answers, ClassChange, Comparison, Disagreement

#: Images that are listed of those on which the two differ most.
WORST = 8
_BINS = 15


def compare(
    original: Array, candidate: Array, targets: Array | None = None, *, stages: tuple[str, str] = ("pytorch", "candidate")
) -> Comparison:
    """Compare ``candidate`` with ``original``, logits (n, classes) each; ``targets`` (n,) are class indices, None: no labels.

    An image with a NaN or infinite logit counts as answered wrongly, and not in what needs probabilities.
    """
    finite = np.isfinite(original).all(axis=1) & np.isfinite(candidate).all(axis=1)
    answers = [top1(original), top1(candidate)]
    divergence = np.full(len(original), np.nan)
    log_p, log_q = (_log_softmax(logits[finite]) for logits in (original, candidate))
    divergence[finite] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).clip(min=0)
    differ = np.flatnonzero(finite & (answers[0] != answers[1]))
    worst = differ[np.argsort(-divergence[differ], kind="stable")][:WORST]
    right = None
    if targets is not None:
        right = [np.isfinite(x).all(axis=1) & (target_rank(x, targets) == 0) for x in (original, candidate)]
    return Comparison(
        images=len(original),
        original=_answers(stages[0], original, targets),
        candidate=_answers(stages[1], candidate, targets),
        mcnemar=None if right is None else mcnemar(int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())),
        divergence=float(divergence[finite].mean()) if finite.any() else None,
        classes=[] if right is None or targets is None else _class_changes(targets, right),
        worst=[
            Disagreement(
                image=int(image),
                label=None if targets is None else int(targets[image]),
                original=int(answers[0][image]),
                candidate=int(answers[1][image]),
                divergence=float(divergence[image]),
            )
            for image in worst
        ],
    )


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value of McNemar's test (Psychometrika 12, 1947) that two models are equally often right.

    Of the images on which just one of them is right, half are ``gained`` if they are: a binomial test. Its time does not
    depend on the counts. Needs scipy where they differ.
    """
    if lost == gained:
        return 1.0
    from scipy.special import bdtr  # the binomial distribution; scipy.stats has the test itself, and takes a second to import

    return float(min(1.0, 2 * bdtr(min(lost, gained), lost + gained, 0.5)))


def calibration_error(logits: Array, targets: Array) -> float | None:
    """Expected calibration error in percent: 15 bins of equal width over the confidence (Guo et al., ICML 2017, eq. 3).

    Images with a NaN or infinite logit are left out; None where there are no others.
    """
    finite = np.isfinite(logits).all(axis=1)
    if not finite.any():
        return None
    logits, targets = logits[finite], targets[finite]
    confidence = np.exp(_log_softmax(logits)).max(axis=1)
    right = (target_rank(logits, targets) == 0).astype(np.float64)
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.abs(np.bincount(bins, right - confidence, _BINS))
    return 100 * float(gaps.sum() / len(logits))


def _answers(stage: str, logits: Array, targets: Array | None) -> Answers:
    finite = np.isfinite(logits).all(axis=1)
    confidence = np.exp(_log_softmax(logits[finite])).max(axis=1)
    found: dict[str, float | None] = {"top1": None, "top5": None, "calibration_error": None}
    if targets is not None:
        rank = target_rank(logits, targets)
        found["top1"] = 100 * int((finite & (rank == 0)).sum()) / len(logits)
        found["top5"] = 100 * int((finite & (rank < 5)).sum()) / len(logits)
        found["calibration_error"] = calibration_error(logits, targets)
    mean = 100 * float(confidence.mean()) if len(confidence) else 0.0
    return Answers.model_validate({"stage": stage, "confidence": min(100.0, mean), **found})


def _class_changes(targets: Array, right: list[Array]) -> list[ClassChange]:
    classes = int(targets.max(initial=-1)) + 1
    images, was, now = (np.bincount(targets, each, classes).astype(np.int64) for each in (np.ones(len(targets)), *right))
    order = sorted(np.flatnonzero(was != now), key=lambda label: (now[label] - was[label], label))
    return [
        ClassChange(label=int(label), images=int(images[label]), original=int(was[label]), candidate=int(now[label]))
        for label in order
    ]


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True, initial=-math.inf)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
