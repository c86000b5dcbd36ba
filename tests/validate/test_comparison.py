"""Two models on the same images: McNemar's test, calibration, classes and the worst images, against scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from validate.comparison import WORST, calibration_error, compare, mcnemar


def test_mcnemar_by_hand() -> None:
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(2 * (1 + 6) / 64)
    assert (mcnemar(0, 0), mcnemar(7, 7)) == (1, 1)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 1), (12, 12), (40, 17), (300, 350), (0, 30)])
def test_mcnemar_is_the_binomial_test_of_the_images_on_which_one_is_right(lost: int, gained: int) -> None:
    wanted = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == mcnemar(gained, lost) == pytest.approx(wanted, rel=1e-9)


def test_mcnemar_of_a_large_set_neither_overflows_nor_takes_long() -> None:
    assert mcnemar(10_000, 10_400) == pytest.approx(stats.binomtest(10_000, 20_400).pvalue, rel=1e-9)
    many = 1 << 30  # as many as a stranger's report may claim
    assert mcnemar(many - (1 << 15), many - 1) == pytest.approx(2 * stats.norm.cdf(-(2**15) / 2**15.5), rel=1e-4)


def logits(seed: int, images: int = 200, classes: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((images, classes)).astype(np.float32) * 3


def test_a_model_that_is_as_sure_as_it_is_right_is_calibrated() -> None:
    sure = np.full((1000, 2), [math.log(0.8), math.log(0.2)], dtype=np.float32)
    targets = (np.arange(1000) % 5 == 0).astype(np.int64)  # four in five are class 0
    assert calibration_error(sure, targets) == pytest.approx(0, abs=1e-4)
    assert calibration_error(sure, np.ones(1000, dtype=np.int64)) == pytest.approx(80, abs=1e-4)
    assert calibration_error(np.full((3, 2), np.nan, dtype=np.float32), targets[:3]) is None


def test_calibration_is_the_weighted_gap_of_its_bins() -> None:
    found, targets = logits(0), np.random.default_rng(1).integers(0, 7, 200)
    probability = special.softmax(found.astype(np.float64), axis=1)
    sure, right = probability.max(1), probability.argmax(1) == targets
    bins = [(sure > low / 15) & (sure <= (low + 1) / 15) for low in range(15)]
    wanted = sum(each.mean() * abs(right[each].mean() - sure[each].mean()) for each in bins if each.any())
    assert calibration_error(found, targets) == pytest.approx(100 * wanted)


def test_the_worst_images_are_those_of_the_largest_divergence_among_the_differing() -> None:
    original, candidate = logits(0), logits(0)
    candidate[:20] = candidate[:20, ::-1]
    found = compare(original, candidate, stages=("pytorch", "engine"))
    p, q = (special.softmax(x.astype(np.float64), axis=1) for x in (original, candidate))
    divergence = special.rel_entr(p, q).sum(1)
    differ = np.flatnonzero(original.argmax(1) != candidate.argmax(1))
    wanted = sorted(differ, key=lambda image: -divergence[image])[:WORST]
    assert [each.image for each in found.worst] == wanted
    assert [each.divergence for each in found.worst] == pytest.approx([divergence[image] for image in wanted])
    assert found.divergence == pytest.approx(divergence.mean())
    assert (found.mcnemar, found.original.top1, found.classes, found.worst[0].label) == (None, None, [], None)


def test_classes_that_changed_are_named_the_worst_first() -> None:
    targets = np.repeat(np.arange(3), 4)
    original = np.eye(3, dtype=np.float32)[targets]
    candidate = original.copy()
    candidate[0:3] = np.eye(3, dtype=np.float32)[1]  # three of class 0 lost
    original[8] = np.eye(3, dtype=np.float32)[0]  # one of class 2 gained
    found = compare(original, candidate, targets)
    assert [(each.label, each.images, each.original, each.candidate) for each in found.classes] == [(0, 4, 4, 1), (2, 4, 3, 4)]
    assert found.mcnemar == pytest.approx(stats.binomtest(1, 4).pvalue)
    assert found.original.top1 == pytest.approx(100 * 11 / 12)


def test_an_image_without_finite_logits_is_wrong_and_has_no_divergence() -> None:
    original, targets = logits(0, 4), np.zeros(4, dtype=np.int64)
    original[:, 0] = 20
    candidate = original.copy()
    candidate[1, 3] = np.inf
    found = compare(original, candidate, targets)
    assert (found.original.top1, found.candidate.top1, found.divergence) == (100, 75, 0)
    nothing = compare(original, np.full_like(original, np.nan), targets)
    assert (nothing.candidate.top1, nothing.divergence, nothing.worst) == (0, None, [])
    assert nothing.candidate.calibration_error is None
