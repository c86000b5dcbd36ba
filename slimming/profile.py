"""How many tokens each block keeps under a budget: the profile that moves the model's answers least.

Profiles are curves ``N - (N - e) (l / L')^p`` over the blocks l: p says how early tokens go, and the budget then fixes the
count e that the curve ends at. The paper's own profile for DeiT-S (Fig. 5) is close to p = 1. The best p is found by climbing:
each trial is one walk and one slimmed run on the sample, and its merit the KL divergence to the dense model's answers. No labels
are used.

Measured against the same tolerance for every block, which is how Algorithm 1 spreads its error: see ``benchmarks/accuracy``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from slimming.costs import Cost
from slimming.door import BudgetUnreachable

#: Values of p that are tried, from tokens dropped early to tokens dropped late.
POWERS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
_FIRST = 4


class Judge(Protocol):
    """What a search knows of its model."""

    tokens: int
    depth: int
    prefix: int

    @property
    def fixed_head(self) -> int | None:
        """The count of the last block, where the head fixes it."""

    def divergence(self, counts: Sequence[int]) -> float:
        """How far a plan of these counts moves the answers."""


def profile_within(judge: Judge, cost: Cost, limit: float) -> list[int]:
    """The token counts of the profile that diverges least among those that cost at most ``limit``.

    Raises ``BudgetUnreachable`` naming the nearest reachable point.
    """
    head = judge.fixed_head
    least = curve(judge, 0.0, judge.prefix + (head is None))
    dense, lowest = cost.dense(), cost.of(least)
    if lowest > limit:
        raise BudgetUnreachable(
            f"{1 - limit / dense:.1%} of the {cost.unit} cannot be removed: no patches at all remove {1 - lowest / dense:.1%} "
            f"(down to {lowest:.4g} of {dense:.4g} {cost.unit}), the nearest reachable point"
        )
    exact = curve(judge, 1.0, judge.tokens)
    if cost.of(exact) <= limit:
        return exact
    profiles = {index: found for index, power in enumerate(POWERS) if (found := _ending(judge, cost, limit, power)) is not None}
    if not profiles:
        power = POWERS[0]
        while (found := _ending(judge, cost, limit, power)) is None:
            power = power / 2 if power > 1e-3 else 0.0
        return found
    tried: dict[int, float] = {}

    def merit(index: int) -> float:
        if index not in tried:
            tried[index] = judge.divergence(profiles[index])
        return tried[index]

    best = min(profiles, key=lambda index: abs(index - _FIRST))
    while True:
        around = [index for index in (best - 1, best + 1) if index in profiles]
        better = min(around, key=merit, default=best)
        if merit(better) >= merit(best):
            return profiles[best]
        best = better


def curve(judge: Judge, power: float, end: int) -> list[int]:
    """The token counts of one profile, prefix tokens included, that ends at ``end``."""
    head = judge.fixed_head
    free = judge.depth - (head is not None)
    counts = [round(judge.tokens - (judge.tokens - end) * ((block + 1) / free) ** power) for block in range(free)]
    if head is not None:
        return [*counts, head]
    readable = judge.tokens - judge.prefix  # a head that pools reads patches; prefix tokens end with the block before
    return [*counts[:-1], min(max(1, counts[-1] - judge.prefix), readable)]


def _ending(judge: Judge, cost: Cost, limit: float, power: float) -> list[int] | None:
    """The profile of this power that ends as high as ``limit`` allows; None where no end is low enough."""
    low, high = judge.prefix + (judge.fixed_head is None), judge.tokens
    if cost.of(curve(judge, power, low)) > limit:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost.of(curve(judge, power, middle)) <= limit else (low, middle - 1)
    return _filled(curve(judge, power, low), judge, cost, limit)


def _filled(counts: list[int], judge: Judge, cost: Cost, limit: float) -> list[int]:
    """What is left of the budget, spent token by token on the deepest block that it pays for."""
    last = len(counts) - 1 - (judge.fixed_head is not None)
    for block in range(last, -1, -1):
        top = judge.tokens if block < len(counts) - 1 else judge.tokens - judge.prefix
        while counts[block] < top:
            raised = list(counts)
            raised[block] += 1
            for index in range(block - 1, -1, -1):
                raised[index] = max(raised[index], raised[index + 1])
            if cost.of(raised) > limit:
                break
            counts = raised
    return counts
