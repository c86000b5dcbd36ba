"""A ladder in words: the gate of confidence, one verdict, and the stage that lost."""

from __future__ import annotations

import numpy as np
import pytest

from patchslim.intervals import drop_interval
from validate.explain import blame, verdict_of, what_it_proves
from validate.parity import gate, not_executed, rung
from validate.parity_records import BatchCheck, Rung


def answers(images: int, wrong: int) -> np.ndarray:
    """Logits that answer class 0, the first ``wrong`` images class 1."""
    logits = np.tile(np.array([2.0, 0.0, 0.0], dtype=np.float32), (images, 1))
    logits[:wrong] = [0.0, 2.0, 0.0]
    return logits


def ladder(images: int, *wrong: int) -> list[Rung]:
    """Original without a mistake, then a stage for each of ``wrong`` mistakes, made from the one before it."""
    original, targets = answers(images, 0), np.zeros(images, dtype=np.int64)
    rungs, before = [rung("pytorch", original, targets)], "pytorch"
    for number, count in enumerate(wrong):
        name = f"stage{number}"
        rungs.append(rung(name, answers(images, count), targets, original, original, compared_to=before))
        before = name
    return rungs


@pytest.mark.parametrize(
    ("images", "wrong", "status"), [(20_000, 100, "passed"), (20_000, 300, "failed"), (400, 4, "undecided")]
)
def test_confidence_passes_fails_or_says_that_it_cannot_tell(images: int, wrong: int, status: str) -> None:
    judged, passed = gate(ladder(images, wrong), 1.0, "confidence")
    assert (judged[1].status, passed) == (status, status == "passed")
    low, high = drop_interval(wrong, 0, images)
    assert {"passed": high <= 1, "failed": low > 1, "undecided": low <= 1 < high}[status]
    assert judged[0].status == "passed"


def test_as_many_images_as_are_named_do_settle_it() -> None:
    judged, _ = gate(ladder(400, 2), 1.0, "confidence")
    assert "images would settle it" in judged[1].note
    needed = int(judged[1].note.split("about ")[1].split()[0])
    enough = -(-needed // 200)  # in units in which one image is wrong
    assert gate(ladder(200 * enough, enough), 1.0, "confidence")[1]
    assert not gate(ladder(100 * enough, enough // 2), 1.0, "confidence")[1]


def test_a_drop_that_is_the_gate_is_never_settled() -> None:
    judged, _ = gate(ladder(400, 4), 1.0, "confidence")
    assert judged[1].note.endswith("no number of images settles a drop that is the gate")
    assert gate(ladder(400, 4), 1.0)[1]


def test_without_labels_confidence_is_about_agreement() -> None:
    original = answers(1000, 0)
    rungs = [rung("pytorch", original), rung("a", answers(1000, 30), None, original)]
    assert gate(rungs, 1.0, "confidence")[0][1].status == "failed"
    assert gate(rungs, 3.0, "confidence")[0][1].status == "undecided"
    assert gate(rungs, 5.0, "confidence")[1]


def test_one_drop_is_said_once() -> None:
    judged, _ = gate(ladder(100, 5, 5, 6), 1.0)
    said = verdict_of(judged)
    assert said == ("stage0: top-1 drops by 5.000 points, more than 1 (stage1 and stage2, made from it, drop with it)")
    assert verdict_of(gate(ladder(100, 1), 1.0)[0]) == ""


def test_what_is_wrong_beside_the_drop_is_said_too() -> None:
    rungs = ladder(100, 5, 5)
    rungs[2] = rungs[2].model_copy(update={"max_error": 3.0, "tolerance": 0.1})
    said = verdict_of(gate(rungs, 1.0)[0])
    assert said.startswith("stage0: top-1 drops by 5.000 points, more than 1; stage1: top-1 drops")
    assert "max logit error 3 against stage0, more than 0.1" in said


def test_the_stage_that_lost_is_named_and_the_points_add_up() -> None:
    rungs = [*ladder(100, 2, 7, 6), not_executed("engine", "no GPU")]
    found = blame(rungs)
    assert [(each.stage, each.before) for each in found] == [("stage0", "pytorch"), ("stage1", "stage0"), ("stage2", "stage1")]
    assert [each.points for each in found] == pytest.approx([2, 5, -1])
    assert sum(each.points for each in found) == pytest.approx(rungs[3].top1_drop)


def test_stages_that_were_not_made_from_one_another_are_told_apart() -> None:
    """As the graphs of two engines: both made from the plan, each with a loss of its own."""
    original, targets = answers(100, 0), np.zeros(100, dtype=np.int64)
    losses = {"slim": (1, "pytorch"), "a": (7, "slim"), "engine": (7, "a"), "b": (6, "slim"), "engine-b": (9, "b")}
    rungs = [rung("pytorch", original, targets)]
    rungs += [rung(name, answers(100, n), targets, original, original, compared_to=to) for name, (n, to) in losses.items()]
    found = {each.stage: (each.before, each.points) for each in blame(rungs)}
    assert found == {"slim": ("pytorch", 1), "a": ("slim", 6), "engine": ("a", 0), "b": ("slim", 5), "engine-b": ("b", 3)}
    said = verdict_of(gate(rungs, 2.0)[0])
    assert said.startswith("a: top-1 drops by 7.000 points, more than 2 (engine, made from it, drops with it); b: top-1 drops")
    assert "engine-b: top-1 drops by 9.000" in said


@pytest.mark.parametrize(("error", "status"), [(1e-5, "passed"), (0.5, "failed"), (None, "failed")])
def test_answers_that_depend_on_the_batch_fail(error: float | None, status: str) -> None:
    rungs = ladder(100, 0)
    rungs[1] = rungs[1].model_copy(update={"batches": BatchCheck(sizes=[1, 2, 3], max_error=error, tolerance=1e-3)})
    judged, _ = gate(rungs, 1.0)
    assert judged[1].status == status
    assert ("answers depend on the batch" in judged[1].note) == (status == "failed")


def test_the_rule_is_part_of_what_is_said() -> None:
    assert what_it_proves(ladder(100, 1), 5.0, "confidence")[0].startswith("gate: with 95 % confidence at most 5 points")
