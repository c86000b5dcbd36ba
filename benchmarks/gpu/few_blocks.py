"""Token counts for a share of the MACs of a model without images: falling after every block, or behind a few blocks alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patchslim.errors import BudgetUnreachable
from slimming.models.reader import reader_of
from slimming.search.costs import Cost, MacsCost
from slimming.search.few_blocks import AUTO, spread_evenly, steps_within
from slimming.search.profile import curve, highest_end

#: Of the ramp ``N - (N - e) (l / L')^p``: what the search takes on the bundled model, or near it.
RAMP_POWER = 0.5


@dataclass
class Sizes:
    """The sizes of a model whose head reads single tokens: ``CountSizes``."""

    tokens: int
    depth: int
    prefix: int
    fixed_head: int | None
    readable: int
    beside: int = 0


def few_block_counts(model: Any, name: str, reduction: float) -> list[int]:
    """Counts that fall behind few evenly spread blocks, as ``--merge-blocks auto`` tries, and use the budget.

    Raises ``BudgetUnreachable``.
    """
    sizes, cost, limit = _asked(model, name, reduction)
    return _reached(steps_within(spread_evenly(sizes, AUTO), sizes, cost, limit, multiple=None), name, reduction)


def ramp_counts(model: Any, name: str, reduction: float) -> list[int]:
    """Counts that fall after every block and use the budget. Raises ``BudgetUnreachable``."""
    sizes, cost, limit = _asked(model, name, reduction)
    end = highest_end(sizes, cost, limit, lambda end: curve(sizes, RAMP_POWER, end))
    return _reached(None if end is None else curve(sizes, RAMP_POWER, end), name, reduction)


def _asked(model: Any, name: str, reduction: float) -> tuple[Sizes, Cost, float]:
    reader = reader_of(model, name)
    cost = MacsCost(reader.tokens, len(reader.blocks), reader.geometry())
    head = len(reader.head.tokens)
    return Sizes(reader.tokens, len(reader.blocks), reader.prefix, head, head), cost, (1 - reduction) * cost.dense()


def _reached(counts: list[int] | None, name: str, reduction: float) -> list[int]:
    if counts is None:
        raise BudgetUnreachable(f"{name}: these counts cannot remove {reduction:.1%}")
    return counts
