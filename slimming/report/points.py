"""A plan as it was measured: how many MACs it removes, and how it answers on held-out images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Interval = tuple[float, float]


@dataclass(frozen=True)
class SweepPoint:
    """One plan of a sweep over budgets, and how it answers."""

    reduction: float  # fraction of the dense MACs removed
    macs: int
    counts: list[int]  # tokens out of each block
    top1: float | None  # percent on held-out images; None where there are no labels
    agreement: float | None  # percent of the images that the slim model answers like the dense one
    errors: list[float]  # E of the block above each cut
    images: int = 0  # that were measured
    drop_interval: Interval | None = None  # 95 % confidence interval of the top-1 lost, points
    agreement_interval: Interval | None = None  # 95 % confidence interval of ``agreement``, percent


def distinct_points(points: Iterable[SweepPoint]) -> list[SweepPoint]:
    """Return the points from the smallest reduction to the largest, equal ones once: budgets close by are met by one plan."""
    found: dict[tuple[object, ...], SweepPoint] = {}
    for point in sorted(points, key=lambda one: one.reduction):
        found.setdefault((tuple(point.counts), point.top1, point.agreement), point)
    return list(found.values())
