"""No stage of a search is silent: every one is named, counted to its end, and begins before its first step is done."""

from __future__ import annotations

import pytest
from timm.data import create_transform

from slimming.accuracy import evaluate
from slimming.api import FinderSettings, PlanFinder
from slimming.models.reader import reader_of
from slimming.search.budget import Budget
from slimming.search.request import PlanRequest
from slimming.search.work import SearchWork
from tests.helpers.finetuning import images
from tests.helpers.timm_models import build

TRANSFORM = create_transform((3, 48, 48))


def test_steps_are_counted_as_trials_begin() -> None:
    said: list[tuple[str, int, int]] = []
    work = SearchWork(lambda *call: said.append(call))
    for steps in (2, 1):
        work.begin(steps)
        for _ in range(steps):
            work.step()
    assert [(done, begun) for _, done, begun in said] == [(0, 2), (1, 2), (2, 2), (2, 3), (3, 3)]


@pytest.mark.parametrize("score", ["similarity", "attention"])
def test_every_stage_of_a_plan_is_told_from_its_beginning_to_its_end(score: str) -> None:
    model = build("class_token", depth=3)
    said: list[tuple[str, int, int]] = []
    settings = FinderSettings(progress=lambda *call: said.append(call))
    request = PlanRequest(Budget("macs-reduction", 0.3), score=score, fit="closed-form")  # type: ignore[arg-type]
    with PlanFinder(reader_of(model, "tiny"), images(), name="tiny", transform=TRANSFORM, settings=settings) as finder:
        found = finder.find_plan(request)
    evaluate([model, found.model], images(), TRANSFORM, progress=settings.progress)
    stages = list(dict.fromkeys(stage for stage, _, _ in said))
    assert stages == ["dense features", "searching", "compensating", "measuring"]
    for name in stages:
        counts = [(done, total) for stage, done, total in said if stage == name]
        assert counts[0][0] == 0
        assert counts[-1][0] == counts[-1][1] > 0
        assert all(done <= total for done, total in counts)
        assert [done for done, _ in counts] == sorted(done for done, _ in counts)
