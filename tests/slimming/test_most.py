"""The largest reduction within a margin: it is within, one percent more is not, and the plan says how it was found."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from export.options import ExportOptions
from export.report.charts import walk_chart
from patchslim.errors import BudgetUnreachable, UsageError
from patchslim.plan import load_plan
from slimming.accuracy import evaluate
from slimming.api import FinderSettings, FoundPlan, PlanFinder
from slimming.data.source import ImageSet
from slimming.models.loading import LoadedModel
from slimming.models.reader import reader_of
from slimming.most import END, MostSearch
from slimming.report.page import PlanPage, write_page
from slimming.report.sweep import plans_at
from slimming.report.tables import walk_table
from slimming.run import SlimmingOptions
from slimming.search.budget import Budget
from slimming.search.request import PlanRequest
from tests.helpers.made_evaluators import Milliseconds
from tests.helpers.timm_models import build

IMAGES = 32


class Noise:
    """Tensors (3, 48, 48), each of the class that the dense model gives it, but for every fourth."""

    transform = None

    def __init__(self, answers: list[int]) -> None:
        self.answers = answers

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 1, 1, generator=generator) + 0.5 * torch.randn(3, 48, 48, generator=generator)
        return image, self.answers[index] if index % 4 else 0


@cache
def search() -> MostSearch:
    model = build("class_token", patch_size=8)
    pixels = torch.stack([Noise([0] * IMAGES)[index][0] for index in range(IMAGES)])
    with torch.no_grad():
        answers = model(pixels).argmax(1).tolist()
    images = ImageSet("noise", "train", "all", [str(name) for name in range(7)], Noise(answers), list(range(IMAGES)))
    finder = PlanFinder(reader_of(model), images, name="tiny", transform=None, settings=FinderSettings(magnitudes=False))
    loaded = LoadedModel("tiny", "tiny", {}, model, {}, "random", "0" * 64, {})
    return MostSearch(finder, loaded, labelled=True)


def request(margin: float, **more: Any) -> PlanRequest:
    return PlanRequest(Budget("macs-reduction", 0.0, within=margin), score="similarity", **more)


def losses(found: FoundPlan) -> tuple[float, float]:
    """Points of top-1 lost and percent of answers changed."""
    finder = search().finder
    slim = search().loaded.slimmed(found.model, found.plan, "split")
    dense, cut = evaluate([finder.reader.model, slim], finder.images, None)
    return dense.top1 - cut.top1, 100 - cut.agreement


@pytest.mark.parametrize(
    ("labelled", "margin", "fit"), [(True, 4.0, "none"), (True, 12.0, "closed-form"), (False, 0.0, "closed-form")]
)
def test_it_is_within_and_one_percent_more_is_not(labelled: bool, margin: float, fit: Any) -> None:
    most = replace(search(), labelled=labelled)
    found = most.find_plan(request(margin, fit=fit))
    value, walk = found.plan.origin.value, found.plan.origin.walk
    assert found.fit == fit
    assert walk is not None
    assert (walk.margin, walk.images, walk.dense_top1 is not None) == (margin, IMAGES, labelled)
    assert losses(found)[0 if labelled else 1] <= margin + 1e-6
    asked = [round(100 * point.reduction) for point in walk.points]
    assert asked == sorted(set(asked))
    assert [point.within for point in walk.points] == [point.drop <= margin for point in walk.points]
    assert value == max((point.reduction for point in walk.points if point.within), default=0.0)
    budget = Budget("macs-reduction", value + 0.01)
    try:
        more = most.finder.find_plan(replace(request(margin, fit=fit), budget=budget))
    except BudgetUnreachable:
        return
    assert losses(more)[0 if labelled else 1] > margin


def test_a_wide_margin_takes_all_that_can_be_reached() -> None:
    found = search().find_plan(request(100.0))
    percent = round(100 * found.plan.origin.value)
    assert 45 < percent < END
    with pytest.raises(BudgetUnreachable):
        search().finder.find_plan(replace(request(1.0), budget=Budget("macs-reduction", (percent + 1) / 100)))


def test_distilling_comes_after_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, str]] = []
    finder = search().finder
    find = finder.find_plan

    def spy(wanted: PlanRequest, *rest: Any, **more: Any) -> FoundPlan:
        asked.append((wanted.budget.value, wanted.fit))
        return find(replace(wanted, fit="closed-form"), *rest, **more)

    monkeypatch.setattr(finder, "find_plan", spy)
    found = search().find_plan(request(10.0, fit="distill"))
    assert [fit for _, fit in asked] == ["closed-form"] * (len(asked) - 1) + ["distill"]
    assert asked[-1][0] == found.plan.origin.value


def test_the_curve_is_kept_printed_and_drawn(tmp_path: Path) -> None:
    plan = search().find_plan(request(5.0)).plan
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    walk = plan.origin.walk
    assert walk is not None
    table = walk_table(walk, plan.dense_macs())
    assert table.row_count == len(walk.points)
    assert "at most 5 points lost, on 32 calibration images" in str(table.title)
    write_page(tmp_path / "plan.html", PlanPage(plan, "split", plan.origin.errors))
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "The way to the largest reduction" in page
    assert "loses at most 5.00 points of top-1 there" in page
    chart = walk_chart(walk, plan.dense_macs())
    assert "Points of top-1 lost against MACs removed" in chart
    assert walk_chart(None, plan.dense_macs()) == ""


def test_a_sweep_beside_a_distilled_plan_is_not_distilled() -> None:
    plans = plans_at(search().finder, PlanRequest(score="similarity", fit="distill"), [0.3, 0.5])
    assert [(plan.fit, plan.finetune) for plan in plans] == [("closed-form", None)] * 2


def test_what_max_means_to_the_options() -> None:
    assert SlimmingOptions(macs_reduction="max").budget == Budget("macs-reduction", 0.0, within=0.2)
    assert SlimmingOptions(latency_reduction="max", max_top1_drop=1.0).budget == Budget("latency-reduction", 0.0, within=1.0)
    assert ExportOptions(macs_reduction="max", max_top1_drop=0.5, snap=8).budget == Budget(
        "macs-reduction", 0.0, snap=8, within=0.5
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_top1_drop": 0.5}, "--max-top1-drop goes with --macs-reduction max"),
        ({"macs_reduction": 0.3, "max_top1_drop": 0.5}, "--max-top1-drop goes with --macs-reduction max"),
        ({"macs_reduction": "max", "max_top1_drop": 101.0}, "--max-top1-drop 101.0: must be from 0 to 100 points"),
        ({"macs_reduction": "max", "max_top1_drop": float("nan")}, "--max-top1-drop nan: must be from 0 to 100 points"),
        ({"macs_reduction": "max", "tokens": "9,1"}, "--macs-reduction and --tokens contradict each other"),
        ({"macs_reduction": "max", "latency_reduction": "max"}, "--macs-reduction and --latency-reduction contradict"),
        ({"latency_reduction": "max"}, "--latency-reduction needs --latency-table"),
    ],
)
def test_what_does_not_go_with_it(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        SlimmingOptions(**given).check()


def test_a_largest_reduction_of_latency_is_found_on_its_table() -> None:
    finder = search().finder
    table = Milliseconds(finder.reader.tokens, (1.0, 1.0, 2.0, 1.0))
    asked = PlanRequest(Budget("latency-reduction", 0.0, within=6.0), score="similarity")
    found = search().find_plan(asked, table)
    origin = found.plan.origin
    assert origin.criterion == "latency-reduction"
    assert origin.walk is not None
    assert origin.value == max((point.reduction for point in origin.walk.points if point.within), default=0.0)
    assert table.of(found.plan.counts) <= (1 - origin.value) * table.dense()
    assert losses(found)[0] <= 6.0 + 1e-6
