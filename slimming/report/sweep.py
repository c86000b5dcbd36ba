"""A sweep over MAC reductions: further plans from the same features, and how each of them answers on held-out images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from patchslim.choices import Layout
from patchslim.errors import BudgetUnreachable
from patchslim.progress import StageProgress
from slimming.accuracy import Accuracy, evaluate
from slimming.api import FoundPlan, PlanFinder
from slimming.data.source import ImageSet
from slimming.distributed import ProcessGroup
from slimming.models.vit_reader import LoadedVit
from slimming.report.points import SweepPoint
from slimming.search.budget import Budget
from slimming.search.request import PlanRequest
from slimming.session import SlimmingSession


@dataclass(frozen=True)
class Sweep:
    """Measured plans, and the top-1 of the dense model in percent; empty and None where there are no images or no labels."""

    points: list[SweepPoint] = field(default_factory=list)
    dense_top1: float | None = None


def plans_at(finder: PlanFinder, request: PlanRequest, reductions: Iterable[float]) -> list[FoundPlan]:
    """Return a plan for each MAC reduction (a fraction) that can be reached, otherwise as ``request``.

    None is distilled, as none is fine-tuned: each would take as long as the plan itself.
    """
    if request.fit in ("distill", "auto"):
        request = replace(request, fit="closed-form")
    found = []
    for reduction in reductions:
        budget = Budget("macs-reduction", reduction, snap=request.budget.snap)
        try:
            found.append(finder.find_plan(replace(request, budget=budget)))
        except BudgetUnreachable:
            continue
    return found


def measure_plans(
    session: SlimmingSession[LoadedVit],
    plans: Sequence[FoundPlan],
    layout: Layout,
    images: ImageSet,
    process_group: ProcessGroup,
    progress: StageProgress,
) -> Sweep:
    """Measure the dense model and every plan on ``images``, shared out over the processes; equal plans are measured once."""
    loaded = session.loaded
    distinct = {_key(each): each for each in reversed(plans)}  # reversed: of equal ones the first
    models = [loaded.reader.model, *(loaded.slimmed(each.model, each.plan, layout) for each in distinct.values())]
    dense, *slim = evaluate(models, images, session.transform, process_group=process_group, progress=progress)
    measured = dict(zip(distinct, slim, strict=True))
    labelled = bool(images.labels)
    points = [_point(each, measured[_key(each)], layout, labelled=labelled) for each in plans]
    return Sweep(points, dense.top1 if labelled else None)


def _key(found: FoundPlan) -> tuple[object, ...]:
    """What makes two plans of one search the same. A fine-tuned one is none of the others."""
    return (tuple(map(tuple, found.plan.kept)), tuple(found.plan.merged_into or ()), found.finetune is not None)


def _point(found: FoundPlan, accuracy: Accuracy, layout: Layout, *, labelled: bool) -> SweepPoint:
    return SweepPoint(
        reduction=1 - found.plan.macs(layout) / found.plan.dense_macs(),
        macs=found.plan.macs(layout),
        counts=found.plan.counts,
        top1=accuracy.top1 if labelled else None,
        agreement=accuracy.agreement,
        errors=found.plan.origin.errors,
        images=accuracy.images,
        drop_interval=accuracy.drop_interval if labelled else None,
        agreement_interval=accuracy.agreement_interval,
    )
