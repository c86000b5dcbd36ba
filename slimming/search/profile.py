"""How many tokens each block keeps under a budget: the profile that moves the model's answers least.

Profiles are curves ``N - (N - e) (l / L')^p`` over the blocks l: p says how early tokens go, and the budget then fixes the
count e that the curve ends at. The paper's own profile for DeiT-S (Fig. 5) is close to p = 1. The best p is found by climbing:
each trial is one walk and one slimmed run on the sample, and its merit the KL divergence to the dense model's answers. No
labels are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from patchslim.errors import BudgetUnreachable, UsageError
from slimming.search.budget import Budget
from slimming.search.costs import Cost, Rounding, snap

#: Values of p that are tried, from tokens dropped early to tokens dropped late.
POWERS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
_FIRST = 4

#: Counts per block by the count that they end at; none grows when the end falls.
Family = Callable[[int], list[int]]


class CountSizes(Protocol):
    """The sizes of a model that bound its counts: ``tokens`` of its input, ``depth`` in blocks, ``prefix`` tokens."""

    tokens: int
    depth: int
    prefix: int

    @property
    def fixed_head(self) -> int | None:
        """The count of the last block, where the head fixes it; else None."""

    @property
    def readable(self) -> int:
        """How many tokens of the last block the head can read, or pool."""

    @property
    def beside(self) -> int:
        """How many tokens the last block keeps on top of its count: those that a head reads one by one beside its pool."""


class ProfileEvaluator(CountSizes, Protocol):
    """A search, as far as counts are chosen by it: the sizes of its model, and how far counts move the model's answers."""

    def divergence(self, counts: Sequence[int]) -> float:
        """Return how far a plan of these counts moves the answers: a mean KL divergence in nats."""

    def quick_divergence(self, counts: Sequence[int]) -> float:
        """Return the same on fewer images, where that saves time: for trials by the dozen."""


@dataclass(frozen=True)
class Profile:
    """Counts that meet a budget, and how far they move the answers; None where there was nothing to choose from."""

    counts: list[int]
    divergence: float | None = None


@dataclass(frozen=True)
class SnappedCost:
    """What counts cost once they are snapped down, so that a limit still holds after snapping."""

    cost: Cost
    sizes: CountSizes
    multiple: int

    @property
    def unit(self) -> str:
        return self.cost.unit

    def of(self, counts: Sequence[int]) -> float:
        return self.cost.of(snapped(self.sizes, counts, self.multiple, "down"))

    def dense(self) -> float:
        return self.cost.dense()


@dataclass(frozen=True)
class PaidBeside:
    """What counts cost once ``beside`` tokens are added to the last one."""

    cost: Cost
    beside: int

    @property
    def unit(self) -> str:
        return self.cost.unit

    def of(self, counts: Sequence[int]) -> float:
        before = counts[-2] if len(counts) > 1 else counts[-1] + self.beside
        return self.cost.of([*counts[:-1], min(counts[-1] + self.beside, before)])

    def dense(self) -> float:
        return self.cost.dense()


def asked_counts(sizes: CountSizes, budget: Budget) -> list[int]:
    """Return the counts that a budget in tokens names, without what is kept beside the last one; raises ``UsageError``."""
    counts = budget.counts(sizes.tokens, sizes.depth, sizes.prefix)
    beside = sizes.beside
    if counts[-1] <= beside:
        raise UsageError(f"--tokens: the last block keeps the {beside} prefix tokens and a patch, so at least {beside + 1}")
    counts[-1] -= beside
    if sizes.fixed_head is not None and counts[-1] != sizes.fixed_head:
        raise UsageError(f"--tokens: the last block keeps what the head reads, {sizes.fixed_head}, not {counts[-1]}")
    if sizes.fixed_head is None and len(counts) > 1 and counts[-2] < counts[-1] + sizes.prefix:
        raise UsageError(
            f"--tokens: the last block keeps no prefix tokens for a head that pools, the others keep all {sizes.prefix}: "
            f"{counts[-1]} in the last block need at least {counts[-1] + sizes.prefix} in the one before"
        )
    return counts


def snapped(sizes: CountSizes, counts: Sequence[int], multiple: int, rounding: Rounding = "nearest") -> list[int]:
    """Return ``counts`` rounded by ``slimming.search.costs.snap``.

    The last block of a head that pools needs no prefix tokens, but the blocks below keep them: it is rounded with them counted
    in, so that nesting adds nothing to the others.
    """
    least = least_count(sizes)
    rounded = snap(list(counts), multiple, sizes.tokens, least, rounding)
    if sizes.fixed_head is None and counts[-1] < sizes.tokens - sizes.prefix:
        rounded[-1] = snap([counts[-1] + sizes.prefix], multiple, sizes.tokens, least, rounding)[0] - sizes.prefix
    elif sizes.fixed_head is None:
        rounded[-1] = counts[-1]
    return rounded


def check_reachable(sizes: CountSizes, cost: Cost, limit: float) -> None:
    """Raise ``BudgetUnreachable``, naming the nearest reachable point, where no counts at all cost at most ``limit``."""
    dense, lowest = cost.dense(), cost.of(curve(sizes, 0.0, least_count(sizes)))
    if lowest > limit:
        raise BudgetUnreachable(
            f"{1 - limit / dense:.1%} of the {cost.unit} cannot be removed: no patches at all remove {1 - lowest / dense:.1%} "
            f"(down to {lowest:.4g} of {dense:.4g} {cost.unit}), the nearest reachable point"
        )


def least_count(sizes: CountSizes) -> int:
    """Return the fewest tokens that a block can keep: the prefix tokens, and a patch where the head pools."""
    return sizes.prefix + (sizes.fixed_head is None)


def uniform_within(sizes: CountSizes, cost: Cost, limit: float, multiple: int = 1) -> list[int]:
    """Return one count for every block but the last, a multiple of ``multiple``, as large as ``limit`` allows.

    Raises ``BudgetUnreachable`` naming the nearest reachable point.
    """
    cost = SnappedCost(cost, sizes, multiple)
    check_reachable(sizes, cost, limit)
    ends = [end for end in range(least_count(sizes), sizes.tokens + 1) if cost.of(curve(sizes, 0.0, end)) <= limit]
    return snapped(sizes, curve(sizes, 0.0, max(ends)), multiple, "down")


def profile_within(evaluator: ProfileEvaluator, cost: Cost, limit: float, multiple: int = 1) -> list[int]:
    """Return the counts of ``best_profile``."""
    return best_profile(evaluator, cost, limit, multiple).counts


def best_profile(evaluator: ProfileEvaluator, cost: Cost, limit: float, multiple: int = 1) -> Profile:
    """Return the profile that diverges least among those that cost at most ``limit``, snapped to ``multiple``.

    Raises ``BudgetUnreachable`` naming the nearest reachable point.
    """
    cost = SnappedCost(cost, evaluator, multiple)
    check_reachable(evaluator, cost, limit)
    exact = curve(evaluator, 1.0, evaluator.tokens)
    if cost.of(exact) <= limit:
        return Profile(exact)
    profiles = {
        index: found for index, power in enumerate(POWERS) if (found := _ending(evaluator, cost, limit, power)) is not None
    }
    if not profiles:
        power = POWERS[0]
        while (found := _ending(evaluator, cost, limit, power)) is None:
            power = power / 2 if power > 1e-3 else 0.0
        return Profile(snapped(evaluator, found, multiple, "down"))
    profiles = {index: snapped(evaluator, found, multiple, "down") for index, found in profiles.items()}
    tried: dict[int, float] = {}

    def merit(index: int) -> float:
        if index not in tried:
            tried[index] = evaluator.divergence(profiles[index])
        return tried[index]

    best = min(profiles, key=lambda index: abs(index - _FIRST))
    while True:
        around = [index for index in (best - 1, best + 1) if index in profiles]
        better = min(around, key=merit, default=best)
        if merit(better) >= merit(best):
            return Profile(profiles[best], merit(best))
        best = better


def curve(sizes: CountSizes, power: float, end: int) -> list[int]:
    """Return the token counts of one profile, prefix tokens included, that ends at ``end``."""
    free = free_blocks(sizes)
    return with_head(
        sizes, [round(sizes.tokens - (sizes.tokens - end) * ((block + 1) / free) ** power) for block in range(free)]
    )


def free_blocks(sizes: CountSizes) -> int:
    """Return how many blocks, from the first, have counts that the head does not fix."""
    return sizes.depth - (sizes.fixed_head is not None)


def with_head(sizes: CountSizes, counts: list[int]) -> list[int]:
    """Return the counts of all blocks from those of the free ones, prefix tokens included in all of them."""
    if sizes.fixed_head is not None:
        return [*counts, sizes.fixed_head]
    # Where the head pools, prefix tokens end with the block before, and are in its count.
    return [*counts[:-1], sizes.readable if counts[-1] == sizes.tokens else max(1, counts[-1] - sizes.prefix)]


def highest_end(sizes: CountSizes, cost: Cost, limit: float, family: Family) -> int | None:
    """Return the highest end of ``family`` whose counts cost at most ``limit``; None where no end is low enough."""
    low, high = least_count(sizes), sizes.tokens
    if cost.of(family(low)) > limit:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost.of(family(middle)) <= limit else (low, middle - 1)
    return low


def _ending(sizes: CountSizes, cost: Cost, limit: float, power: float) -> list[int] | None:
    """The profile of this power that ends as high as ``limit`` allows; None where no end is low enough."""
    end = highest_end(sizes, cost, limit, lambda end: curve(sizes, power, end))
    return None if end is None else _filled(curve(sizes, power, end), sizes, cost, limit)


def _filled(counts: list[int], sizes: CountSizes, cost: Cost, limit: float) -> list[int]:
    """What is left of the budget, spent token by token on the deepest block that it pays for."""
    last = len(counts) - 1 - (sizes.fixed_head is not None)
    for block in range(last, -1, -1):
        top = sizes.tokens if block < len(counts) - 1 else sizes.readable
        while counts[block] < top:
            raised = list(counts)
            raised[block] += 1
            for index in range(block - 1, -1, -1):
                room = sizes.prefix if index + 2 == len(counts) and sizes.fixed_head is None else 0
                raised[index] = max(raised[index], min(raised[index + 1] + room, sizes.tokens))
            if cost.of(raised) > limit:
                break
            counts = raised
    return counts
