"""Batches of any size through a ``Runner`` of any limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from patchslim.errors import InputRejected
from patchslim.runner import BatchLimits, Runner, infer_in_batches


class Means:
    """A runner whose logits are the means of each image's channels; it keeps the sizes of its batches."""

    name = "means"

    def __init__(self, limits: BatchLimits) -> None:
        self.batch_limits = limits
        self.sizes: list[int] = []

    def infer(self, images: Any) -> Any:
        fewest, most = self.batch_limits
        if not fewest <= len(images) <= (most or len(images)):
            raise InputRejected(f"{self.name}: {len(images)} images")
        self.sizes.append(len(images))
        return images.mean(axis=(2, 3), dtype=np.float32)


@pytest.mark.parametrize(
    ("limits", "batch", "count", "sizes"),
    [
        ((1, None), 8, 17, [8, 8, 1]),
        ((1, None), 8, 3, [3]),
        ((1, 4), 8, 9, [4, 4, 1]),
        ((4, 4), 8, 9, [4, 4, 4]),
        ((4, 4), 1, 2, [4]),
        ((2, 16), 8, 9, [8, 2]),
        ((2, 16), 1, 3, [2, 2]),
        ((8, None), 2, 8, [8]),
    ],
)
def test_batches_stay_within_the_limits_and_answers_in_order(
    limits: BatchLimits, batch: int, count: int, sizes: list[int]
) -> None:
    images = np.random.default_rng(0).standard_normal((count, 3, 2, 2)).astype(np.float32)
    runner = Means(limits)
    as_protocol: Runner = runner
    np.testing.assert_array_equal(infer_in_batches(as_protocol, images, batch), images.mean(axis=(2, 3), dtype=np.float32))
    assert runner.sizes == sizes
