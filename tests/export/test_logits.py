"""Whether a stage's answers depend on what is beside them in a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from export.logits import BATCH_SIZES, batch_error

if TYPE_CHECKING:
    from export.pipeline import Outcome

INPUTS = np.random.default_rng(0).standard_normal((8, 3, 2, 2)).astype(np.float32)


class Sums:
    """A runner that answers with sums of an image, and adds ``leak`` times those of its neighbours in the batch."""

    name, batch_limits = "sums", (1, None)

    def __init__(self, leak: float = 0.0, broken: int = 0) -> None:
        self.leak, self.broken = leak, broken

    def infer(self, images: np.ndarray) -> np.ndarray:
        sums = images.sum(axis=(2, 3))
        sums = sums + self.leak * sums.sum(axis=0)
        return np.full_like(sums, np.nan) if len(images) == self.broken else sums


def test_answers_that_look_at_their_neighbours_are_found() -> None:
    assert batch_error(Sums(), INPUTS, Sums().infer(INPUTS)) == 0
    assert batch_error(Sums(0.1), INPUTS, Sums(0.1).infer(INPUTS)) > 0.01


def test_a_batch_size_that_gives_nan_is_found() -> None:
    for size in BATCH_SIZES[:2]:
        assert math.isnan(batch_error(Sums(broken=size), INPUTS, Sums().infer(INPUTS)))


def test_a_size_does_not_divide_the_images() -> None:
    assert len(INPUTS) % BATCH_SIZES[-1]


def test_every_stage_that_ran_was_run_at_other_batch_sizes(ort_export: Outcome) -> None:
    for one in ort_export.parity.rungs:
        if one.stage == "engine":
            continue  # the same run as onnx-slim
        assert one.batches is not None
        assert one.batches.sizes == list(BATCH_SIZES)
        assert one.batches.max_error is not None
        assert one.batches.max_error <= one.batches.tolerance


def test_the_comparison_is_of_the_last_stage_that_answered(ort_export: Outcome) -> None:
    found, rungs = ort_export.parity.comparison, {one.stage: one for one in ort_export.parity.rungs}
    assert found is not None
    assert (found.original.stage, found.candidate.stage) == ("pytorch", "onnx-slim")
    assert found.candidate.top1 == rungs["onnx-slim"].top1
    assert sum(each.original - each.candidate for each in found.classes) == (rungs["onnx-slim"].lost or 0) - (
        rungs["onnx-slim"].gained or 0
    )
