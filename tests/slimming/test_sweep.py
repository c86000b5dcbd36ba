"""Plans measured side by side: what each answers right, how sure that is, and equal plans once."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from patchslim.intervals import drop_interval, proportion_interval
from slimming.accuracy import evaluate
from slimming.api import FoundPlan
from slimming.data.source import ImageSet
from slimming.distributed import SINGLE_PROCESS
from slimming.report.sweep import measure_plans
from tests.helpers.timm_models import build, random_plan

CLASSES, COUNT = 4, 22


class Numbered:
    """Images of one pixel that holds the image's number; every class in turn."""

    transform: Any = None

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 1, 1), float(index)), index % CLASSES


class Answers(nn.Module):
    """A model that is wrong on some images."""

    def __init__(self, *wrong: int) -> None:
        super().__init__()
        self.wrong, self.scale, self.runs = set(wrong), nn.Parameter(torch.ones(())), 0

    def forward(self, images: Tensor) -> Tensor:
        self.runs += 1
        numbers = images[:, 0, 0, 0].long()
        off = torch.tensor([int(number) in self.wrong for number in numbers]).long()
        return nn.functional.one_hot((numbers + off) % CLASSES, CLASSES) * self.scale


def images(labelled: bool = True) -> ImageSet:
    labels = [str(name) for name in range(CLASSES)] if labelled else []
    return ImageSet("numbered", "val", "all", labels, cast(Any, Numbered()), list(range(COUNT)))


def test_what_is_lost_and_gained_is_counted_image_by_image() -> None:
    dense, slim = evaluate([Answers(0, 1, 2), Answers(2, 3, 4, 5, 6)], images(), None)
    assert (dense.right, dense.agreeing, dense.lost, dense.gained) == (19, 22, 0, 0)
    assert (slim.right, slim.lost, slim.gained) == (17, 4, 2)
    assert slim.agreeing == 22 - 4 - 2  # on image 2 both are wrong, and alike
    assert (slim.top1, slim.agreement) == pytest.approx((100 * 17 / 22, 100 * 16 / 22))
    assert slim.drop_interval == drop_interval(4, 2, 22)
    assert slim.drop_interval[0] < dense.top1 - slim.top1 < slim.drop_interval[1]
    assert slim.agreement_interval == proportion_interval(16, 22)


@dataclasses.dataclass
class Loaded:
    """What ``measure_plans`` takes of a loaded model: the dense one, and each plan's."""

    model: nn.Module

    @property
    def reader(self) -> Loaded:
        return self

    def slimmed(self, model: nn.Module, plan: object, layout: object) -> nn.Module:
        return model


@dataclasses.dataclass
class Session:
    """A session around it."""

    loaded: Loaded
    transform: None = None


@pytest.mark.parametrize("labelled", [True, False])
def test_equal_plans_are_measured_once_and_told_each(labelled: bool) -> None:
    model = build("class_token")
    one, other = (random_plan(model, seed) for seed in (0, 1))
    first, again, second = Answers(1, 2), Answers(1, 2), Answers(3)
    plans = [FoundPlan(one, first, "none"), FoundPlan(other, second, "none"), FoundPlan(one, again, "none")]
    session = cast(Any, Session(Loaded(Answers(0))))
    sweep = measure_plans(session, plans, "split", images(labelled), SINGLE_PROCESS, lambda *_: None)
    assert (first.runs > 0, second.runs > 0, again.runs) == (True, True, 0)
    assert sweep.points[0] == sweep.points[2]
    assert [point.counts for point in sweep.points] == [one.counts, other.counts, one.counts]
    assert [point.images for point in sweep.points] == [COUNT] * 3
    if labelled:
        assert sweep.dense_top1 == pytest.approx(100 * 21 / 22)
        assert [point.top1 for point in sweep.points[:2]] == pytest.approx([100 * 20 / 22, 100 * 21 / 22])
        assert sweep.points[0].drop_interval == drop_interval(2, 1, COUNT)
    else:
        assert (sweep.dense_top1, sweep.points[0].top1, sweep.points[0].drop_interval) == (None, None, None)
    assert sweep.points[0].agreement_interval == proportion_interval(19, COUNT)
