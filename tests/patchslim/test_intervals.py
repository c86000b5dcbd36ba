"""Confidence intervals: by hand, and by how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from patchslim.intervals import drop_interval, images_needed, proportion_interval


def test_the_interval_by_hand() -> None:
    low, high = drop_interval(8, 2, 98)  # b 8.5, c 2.5, N 100
    half = 1.959963984540054 * math.sqrt(11 - 36 / 100) / 100
    assert (low, high) == pytest.approx((100 * (0.06 - half), 100 * (0.06 + half)))
    still = drop_interval(0, 0, 1000)
    assert still[0] < 0 < still[1]


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(500, [0.03, 0.01, 0.96], size=2000)  # a true drop of 2 points
    inside = [low <= 2 <= high for low, high in (drop_interval(int(b), int(c), 500) for b, c, _ in draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_how_many_images_a_gate_needs() -> None:
    for lost, gained, images, points in ((0, 0, 800, 0.2), (10, 4, 800, 0.5), (1, 0, 50, 1.0)):
        needed = images_needed(lost, gained, images, points)
        assert needed is not None
        scale = needed / images
        low, high = drop_interval(round(lost * scale), round(gained * scale), needed)
        centre = (low + high) / 2
        assert 0.8 * points < high - centre < 1.05 * points
    for points in (0.0, 1e-300, 5e-324):
        assert images_needed(0, 0, 10, points) is None


def test_the_interval_of_a_proportion_is_wilsons() -> None:
    square = 1.959963984540054**2
    for count, images in ((0, 10), (8, 10), (10, 10), (451, 2000)):
        share = count / images
        centre = (share + square / (2 * images)) / (1 + square / images)
        half = math.sqrt(square * (share * (1 - share) / images + square / (4 * images**2))) / (1 + square / images)
        expected = (100 * (centre - half), 100 * (centre + half))
        assert proportion_interval(count, images) == pytest.approx(expected, abs=1e-9)
