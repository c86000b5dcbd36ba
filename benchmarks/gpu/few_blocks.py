"""Token counts for a share of the MACs: falling after every block, or behind a few blocks alone."""

from __future__ import annotations

from typing import Any

from patchslim.errors import BudgetUnreachable
from patchslim.macs import macs_of
from slimming.models.reader import reader_of

#: Blocks behind which the plans of few merging blocks merge, of twelve, counted from 1.
FEW_OF_12 = (2, 5, 8)
_STEPS = 400


def few_block_counts(model: Any, name: str, reduction: float) -> list[int]:
    """Counts that fall by one ratio behind each of a few blocks, the last 1, and cost the most that the budget allows.

    Raises ``BudgetUnreachable``.
    """
    reader = reader_of(model, name)
    depth, tokens = len(reader.blocks), reader.tokens
    places = sorted({max(1, round(place * depth / 12)) for place in FEW_OF_12})

    def counts(ratio: float) -> list[int]:
        times = [sum(place <= block for place in places) for block in range(depth - 1)]
        return [*(max(2, round(tokens * ratio**power)) for power in times), 1]

    return _most(model, name, reduction, [counts(step / _STEPS) for step in range(_STEPS // 10, _STEPS)])


def ramp_counts(model: Any, name: str, reduction: float) -> list[int]:
    """Counts that fall by one ratio after every block, the last 1, and cost the most that the budget allows.

    Raises ``BudgetUnreachable``.
    """
    reader = reader_of(model, name)
    depth, tokens = len(reader.blocks), reader.tokens
    ratios = [step / 1000 for step in range(500, 1000)]
    return _most(
        model, name, reduction, [[*(max(2, round(tokens * ratio ** (b + 1))) for b in range(depth - 1)), 1] for ratio in ratios]
    )


def _most(model: Any, name: str, reduction: float, curves: list[list[int]]) -> list[int]:
    reader = reader_of(model, name)
    geometry, tokens = reader.geometry(), reader.tokens
    limit = (1 - reduction) * macs_of([tokens] * len(reader.blocks), tokens, geometry)
    costs = [(macs_of(counts, tokens, geometry), counts) for counts in curves]
    fitting = [(cost, counts) for cost, counts in costs if cost <= limit]
    if not fitting:
        raise BudgetUnreachable(f"{name}: these curves cannot remove {reduction:.1%}")
    return max(fitting)[1]
