"""Other ways to spend the same MACs than our default plan, each for one budget: rows of the accuracy tables.

- resolution: the same weights on smaller images, positions resampled, at the side whose cost is nearest to the budget;
- blocks-N: our merging, in N blocks that are searched (``--merge-blocks N``);
- DiffRate: the counts that Chen et al. (ICCV 2023, 2305.17997) publish for a DeiT-Ti of 0.7 GFLOPs, drawn out or in to the
  budget and over other depths, our merging;
- radial: the counts of a ramp (``--merge-blocks ramp``); the patches nearest to the centre are kept, the others dropped.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.rows import BLOCKS
from patchslim.errors import BudgetUnreachable, UsageError

if TYPE_CHECKING:
    from torch import nn

    from slimming.api import FoundPlan, PlanFinder
    from slimming.run import SlimmingOptions

#: Tokens behind the blocks of a DeiT-Ti by DiffRate at 0.7 GFLOPs (its repository's compression_rate.json), the last without
#: what no head reads.
DIFFRATE = (197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49)
_STEPS = 1000


def at_lower_resolution(model: nn.Module, name: str, budget: float) -> tuple[nn.Module, dict[str, Any]]:
    """The dense model on smaller images, at the side whose cost is nearest to the budget; what its row says.

    Raises ``BudgetUnreachable`` where there is no smaller side.
    """
    from benchmarks.accuracy.resolution import at_resolution, dense_macs, macs_by_side

    costs = macs_by_side(model, name)
    if not costs:
        raise BudgetUnreachable("the images are one patch high")
    wanted = (1 - budget) * dense_macs(model, name)
    side = min(costs, key=lambda side: abs(costs[side] - wanted))
    return at_resolution(model, side), {"macs": costs[side], "side": side}


def other_plan(method: str, finder: PlanFinder, options: SlimmingOptions) -> FoundPlan:
    """The plan of one of the other methods with its fit; ``options`` are those of our default plan at the same budget.

    Raises ``BudgetUnreachable`` and ``UsageError``.
    """
    if method in ("DiffRate", "radial") and not finder.reader.head.fixed:
        raise UsageError("is for heads that read single tokens, and this model's pools")
    if method == "DiffRate":
        return _by_diffrates_counts(finder, options)
    if method == "radial":
        return _around_the_centre(finder, options)
    asked = dataclasses.replace(options, merge_blocks=method.removeprefix(BLOCKS))
    asked.check()
    return finder.find_plan(asked.request())


def _by_diffrates_counts(finder: PlanFinder, options: SlimmingOptions) -> FoundPlan:
    """DiffRate's counts at a budget, merged as we do."""
    from slimming.search.costs import MacsCost

    reader = finder.reader
    depth, tokens = len(reader.blocks), reader.tokens
    cost = MacsCost(tokens, depth, reader.geometry(), merged=True)
    limit = (1 - options.budget.value) * cost.dense()
    for step in range(_STEPS):
        counts = [*diffrate_counts(tokens, depth, 2 * step / _STEPS), len(reader.head.tokens)]
        if cost.of(counts) <= limit:
            asked = dataclasses.replace(options, macs_reduction=None, merge_blocks=None, tokens=",".join(map(str, counts)))
            return finder.find_plan(asked.request())
    raise BudgetUnreachable(f"its counts cannot remove {options.budget.value:.0%}")


def _around_the_centre(finder: PlanFinder, options: SlimmingOptions) -> FoundPlan:
    """A ramp's counts with the patches nearest to the centre; what is dropped is dropped."""
    from slimming.api import FoundPlan, make_plan
    from slimming.fitting.closed_form import can_compensate, compensate

    dense = finder.reader.model
    if not can_compensate(dense):
        raise UsageError("a model whose blocks end in norms has no closed-form fit")
    ramp = finder.find_plan(dataclasses.replace(options, fit="none", merge_blocks="ramp").request()).plan
    rows, columns = ramp.grid
    away = {
        ramp.prefix_tokens + row * columns + column: (row - (rows - 1) / 2) ** 2 + (column - (columns - 1) / 2) ** 2
        for row in range(rows)
        for column in range(columns)
    }
    order = [*range(ramp.prefix_tokens), *sorted(away, key=lambda token: away[token])]
    kept = [sorted(order[:count]) for count in ramp.counts[:-1]] + [ramp.kept[-1]]
    plan = make_plan(dense, ramp.model, kept)
    model = copy.deepcopy(dense)
    compensate(model, finder.features, plan)
    return FoundPlan(plan, model, "closed-form")


def diffrate_counts(tokens: int, depth: int, stretch: float) -> list[int]:
    """DiffRate's counts for the blocks but the last, at the same depths; ``stretch`` 1 drops as much as its own."""
    found = []
    for block in range(depth - 1):
        place = (block + 1) / (depth - 1) * len(DIFFRATE) - 1
        low = min(max(int(place), 0), len(DIFFRATE) - 2)
        kept = DIFFRATE[low] + (DIFFRATE[low + 1] - DIFFRATE[low]) * (place - low)
        found.append(max(2, min(tokens, round(tokens * (1 - stretch * (1 - kept / DIFFRATE[0]))))))
    return [min(found[: block + 1]) for block in range(len(found))]
