"""The largest reduction whose plan loses no more than a margin, found by bisection on the calibration images.

Every trial is a whole plan with its closed-form fit, and what it loses is counted image by image against the dense model. The
fit has seen these images, so that what is found is a little hopeful: held-out images prove it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from patchslim.errors import BudgetUnreachable
from patchslim.plan import Walk, WalkedPoint
from slimming.accuracy import evaluate
from slimming.api import FoundPlan, PlanFinder
from slimming.models.vit_reader import LoadedVit
from slimming.search.costs import Cost
from slimming.search.request import PlanRequest

#: The first reduction tried, and the smallest that is taken to fail without a trial, in percent.
FIRST, END = 45, 96


@dataclass(frozen=True)
class MostSearch:
    """What the walk needs: a finder on the calibration images, its model, and whether the images' classes are the model's."""

    finder: PlanFinder
    loaded: LoadedVit
    labelled: bool

    def find_plan(self, request: PlanRequest, cost: Cost | None = None, *, checkpoint: Path | None = None) -> FoundPlan:
        """Return the plan of the largest reduction, in whole percent, that loses at most ``request.budget.within`` points.

        Where no trial is within them, the plan removes what costs nothing: what the last block computes for no one. The plan
        says how it was found (``origin.walk``). ``cost`` and ``checkpoint`` are those of ``PlanFinder.find_plan``, which is
        what raises.
        """
        margin = request.budget.within
        assert margin is not None
        choice = self.finder.chosen_fit(request)
        if choice is not None:
            request = replace(request, fit=choice.fit)
        # What distilling wins comes on top: a trial of it would take minutes.
        trial = replace(request, fit="closed-form" if request.fit == "distill" else request.fit)
        points: dict[int, WalkedPoint] = {}
        dense_top1: float | None = None
        low, high, best = 0, END, None
        middle = FIRST
        while high - low > 1:
            try:
                found = self.finder.find_plan(_at(trial, middle), cost)
            except BudgetUnreachable:
                high = middle
            else:
                points[middle], dense_top1 = self._measured(found, request, middle / 100, margin)
                low, high = (middle, high) if points[middle].within else (low, middle)
                best = found if points[middle].within else best
            middle = (low + high) // 2
        if best is None or request.fit == "distill":
            best = self.finder.find_plan(_at(request, low), cost, checkpoint=checkpoint)
        walk = Walk(
            margin=margin,
            images=len(self.finder.images),
            dense_top1=dense_top1,
            points=[points[percent] for percent in sorted(points)],
        )
        origin = best.plan.origin.model_copy(update={"walk": walk})
        reason = choice.reason if choice else None
        return replace(best, plan=best.plan.model_copy(update={"origin": origin}), fit_reason=reason)

    def _measured(
        self, found: FoundPlan, request: PlanRequest, reduction: float, margin: float
    ) -> tuple[WalkedPoint, float | None]:
        """A trial as it answers on the calibration images, and the dense model's top-1 there."""
        finder, plan = self.finder, found.plan
        models: list[nn.Module] = [finder.reader.model, self.loaded.slimmed(found.model, plan, request.layout)]
        group, progress = finder.settings.process_group, finder.settings.progress
        dense, slim = evaluate(models, finder.images, finder.transform, process_group=group, progress=progress)
        if self.labelled:
            drop, interval = 100 * (slim.lost - slim.gained) / slim.images, slim.drop_interval
        else:
            low, high = slim.agreement_interval
            drop, interval = 100 * (slim.images - slim.agreeing) / slim.images, (100 - high, 100 - low)
        point = WalkedPoint(
            reduction=reduction,
            macs=plan.macs(request.layout),
            top1=slim.top1 if self.labelled else None,
            agreement=slim.agreement,
            drop=drop,
            interval=interval,
            within=drop <= margin,
        )
        return point, dense.top1 if self.labelled else None


def _at(request: PlanRequest, percent: int) -> PlanRequest:
    return replace(request, budget=replace(request.budget, value=percent / 100, within=None))
