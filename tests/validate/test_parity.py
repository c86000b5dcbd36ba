"""Parity arithmetic against numbers worked out by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from validate import parity
from validate.parity_records import Rung


def one_hot(classes: list[int], count: int = 4) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


def test_counts_by_hand() -> None:
    targets = np.array([0, 1, 2, 3, 0])
    original = one_hot([0, 1, 2, 0, 1])  # right on the first three
    slim = one_hot([0, 1, 3, 3, 1])  # loses image 2, gains image 3
    rung = parity.rung("pytorch-slim", slim, targets, original, original, compared_to="pytorch")
    assert (rung.images, rung.top1, rung.top1_drop, rung.lost, rung.gained) == (5, 60.0, 0.0, 1, 1)
    assert rung.agreement == 60.0
    assert rung.max_error == 1.0
    assert rung.mean_error == pytest.approx(4 / 20)  # two images differ in two logits each
    assert rung.top5 == 100.0  # fewer than five classes: every target is among the first five


def test_top_k_is_sklearns() -> None:
    from sklearn.metrics import accuracy_score, top_k_accuracy_score

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((200, 12)).astype(np.float32)
    targets = rng.integers(0, 12, 200)
    rung = parity.rung("pytorch", logits, targets)
    assert rung.top1 == pytest.approx(100 * accuracy_score(targets, logits.argmax(axis=1)))
    assert rung.top5 == pytest.approx(100 * top_k_accuracy_score(targets, logits, k=5, labels=range(12)))
    assert (rung.top1_drop, rung.agreement) == (0.0, 100.0)


def test_a_tie_goes_to_the_lowest_index() -> None:
    logits = np.zeros((2, 7), dtype=np.float32)
    assert parity.top1(logits).tolist() == [0, 0]
    assert parity.target_rank(logits, np.array([0, 5])).tolist() == [0, 5]
    rung = parity.rung("pytorch", logits, np.array([4, 5]))
    assert (rung.top1, rung.top5) == (0.0, 50.0)


@pytest.mark.parametrize(("lost", "images", "limit", "status"), [(1, 500, 0.2, "passed"), (3, 1000, 0.3, "passed")])
def test_exactly_the_limit_passes(lost: int, images: int, limit: float, status: str) -> None:
    targets = np.zeros(images, dtype=np.int64)
    original = one_hot([0] * images)
    slim = one_hot([1] * lost + [0] * (images - lost))
    slim_rung = parity.rung("pytorch-slim", slim, targets, original, original, compared_to="pytorch")
    rungs, passed = parity.gate([parity.rung("pytorch", original, targets), slim_rung], limit)
    assert rungs[1].status == status
    assert passed
    _, passed = parity.gate(rungs, limit - 1e-9)
    assert not passed


def test_nan_is_a_failure_of_its_own() -> None:
    targets = np.array([0, 1])
    original = one_hot([0, 1])
    broken = original.copy()
    broken[1, 1] = np.nan
    rung = parity.rung("onnx-slim", broken, targets, original, original, compared_to="pytorch-slim", tolerance=1.0)
    assert (rung.non_finite, rung.top1, rung.agreement, rung.max_error) == (1, 50.0, 50.0, 0.0)
    rungs, passed = parity.gate([parity.rung("pytorch", original, targets), rung], 100.0)
    assert not passed
    assert "NaN" in rungs[1].note
    every = parity.rung("engine", np.full((2, 4), np.inf), None, original, original, compared_to="onnx-slim", tolerance=1.0)
    assert every.max_error is None
    assert parity.gate([every], 100.0)[0][0].status == "failed"


def test_numerical_loss_is_gated_by_its_own_tolerance() -> None:
    targets = np.array([0, 1])
    original = one_hot([0, 1])
    onnx = original + np.float32(0.25)
    for tolerance, status in ((0.25, "passed"), (0.2, "failed")):
        rung = parity.rung("onnx-slim", onnx, targets, original, original, compared_to="pytorch-slim", tolerance=tolerance)
        judged, passed = parity.gate([parity.rung("pytorch", original, targets), rung], 0.0)
        assert (judged[1].status, passed) == (status, status == "passed")


def test_without_labels_disagreement_is_gated() -> None:
    original, slim = one_hot([0, 1, 2, 3]), one_hot([0, 1, 2, 0])
    rung = parity.rung("pytorch-slim", slim, None, original, original, compared_to="pytorch")
    assert rung.top1 is None
    assert rung.agreement == 75.0
    assert parity.gate([rung], 25.0)[0][0].status == "passed"
    assert parity.gate([rung], 24.0)[0][0].status == "failed"


def test_nothing_run_after_the_original_is_not_a_pass() -> None:
    original = parity.rung("pytorch", one_hot([0]), np.array([0]))
    rungs, passed = parity.gate([original, parity.not_executed("engine", "no GPU")], 0.2)
    assert [rung.status for rung in rungs] == ["passed", "not executed"]
    assert not passed


@pytest.mark.parametrize(
    ("logits", "targets", "original", "word"),
    [
        (np.zeros((0, 4)), None, None, "not empty"),
        (np.zeros(4), None, None, "images, classes"),
        (np.zeros((2, 4)), np.array([0]), None, "targets"),
        (np.zeros((2, 4)), np.array([0, 4]), None, "targets"),
        (np.zeros((2, 4)), np.array([0.0, 1.0]), None, "targets"),
        (np.zeros((2, 4)), None, np.zeros((2, 5)), "original_logits"),
    ],
)
def test_wrong_shapes_are_refused(logits: np.ndarray, targets: np.ndarray, original: np.ndarray, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parity.rung("pytorch", logits, targets, original)


def test_a_rung_cannot_contradict_itself() -> None:
    with pytest.raises(ValidationError, match="top1_drop"):
        Rung(stage="engine", images=1000, top1_drop=0.0, lost=10, gained=0, status="passed")
    with pytest.raises(ValidationError, match="agreement"):
        Rung(stage="engine", images=1000, agreement=100.0, agreeing=10, status="passed")
    with pytest.raises(ValidationError, match="no image was run"):
        Rung(stage="engine", images=0, status="passed")
