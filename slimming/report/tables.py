"""A plan and a sweep as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchslim.plan import SlimPlan, Walk

if TYPE_CHECKING:
    from rich.table import Table

    from slimming.report.points import SweepPoint


def plan_table(plan: SlimPlan) -> Table:
    """Return what each block keeps, and what its cut costs the block above."""
    from rich.table import Table

    table = Table("block", "tokens kept", "E above the cut", title=f"{plan.model}, {plan.mode}, of {plan.tokens} tokens")
    for block, (count, error) in enumerate(zip(plan.counts, plan.origin.errors, strict=True), start=1):
        table.add_row(str(block), str(count), f"{error:.2e}" if error else "exact")
    return table


def sweep_table(points: Sequence[SweepPoint], dense_top1: float | None) -> Table:
    """Return a row for each plan that was measured, from the largest to the smallest; the same plan twice is one row.

    ``dense_top1`` is the dense model's top-1 in percent, None where the images have no labels.
    """
    from rich.table import Table

    from slimming.report.points import distinct_points

    table = Table("MACs removed", "GMACs", "tokens kept", "top-1", "against dense", "answers as dense", title="the sweep")
    for point in distinct_points(points):
        loss = None if point.top1 is None or dense_top1 is None else point.top1 - dense_top1
        table.add_row(
            f"{point.reduction:.1%}",
            f"{point.macs / 1e9:.3f}",
            f"{point.counts[0]} to {point.counts[-1]}",
            _percent(point.top1),
            "-" if loss is None else f"{loss:+.2f}",
            _percent(point.agreement),
        )
    return table


def walk_table(walk: Walk, dense_macs: int) -> Table:
    """Return a row for each plan that was tried on the way to the largest reduction, from the smallest on."""
    from rich.table import Table

    what = "points lost" if walk.dense_top1 is not None else "answers changed, %"
    title = f"the way to the largest reduction: at most {walk.margin:g} {what}, on {walk.images} calibration images"
    table = Table("asked", "MACs removed", "GMACs", "top-1", what, "95 % interval", "within", title=title)
    for point in walk.points:
        table.add_row(
            f"{point.reduction:.0%}",
            f"{1 - point.macs / dense_macs:.1%}",
            f"{point.macs / 1e9:.3f}",
            _percent(point.top1),
            f"{point.drop:.2f}",
            f"{point.interval[0]:.2f} to {point.interval[1]:.2f}",
            "yes" if point.within else "no",
        )
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"
