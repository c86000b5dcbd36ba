"""What a plan costs, as a search sees it: MACs, or milliseconds on a measured table. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from patchslim.choices import Layout, Mode
from patchslim.macs import Geometry, check_counts, macs_of

Rounding = Literal["down", "up", "nearest"]


class Cost(Protocol):
    """The price of a plan by its token counts, block by block; more tokens never cost less."""

    @property
    def unit(self) -> str:
        """What the numbers are: ``MACs`` of one image, or ``ms`` of one batch."""

    def of(self, counts: Sequence[int]) -> float:
        """Return the cost when block l outputs ``counts[l]`` tokens. Raises ``ValueError`` for counts that no plan can have."""

    def dense(self) -> float:
        """Return the cost when every block outputs every token."""


@dataclass(frozen=True)
class MacsCost:
    """Multiply-accumulates of one image, by ``macs_of``; ``merged``: every block but the last merges what it drops.

    ``also`` are other layouts that the plan will be laid in: it costs what it does in the one where that is most.
    """

    tokens: int
    depth: int
    geometry: Geometry
    mode: Mode = "compact"
    layout: Layout = "split"
    merged: bool = False
    also: tuple[Layout, ...] = ()

    @property
    def unit(self) -> str:
        """``MACs``."""
        return "MACs"

    def of(self, counts: Sequence[int]) -> float:
        """Return the MACs when block l outputs ``counts[l]`` tokens. Raises ``ValueError`` for counts that no plan can have."""
        check_counts(counts, self.tokens, self.depth)
        merging = range(self.depth - 1) if self.merged else ()
        layouts = (self.layout, *self.also)
        return float(max(macs_of([*counts], self.tokens, self.geometry, self.mode, one, merging=merging) for one in layouts))

    def dense(self) -> float:
        """Return the MACs of the dense model."""
        return self.of([self.tokens] * self.depth)


def snap(counts: Sequence[int], multiple: int, tokens: int, prefix: int, rounding: Rounding = "nearest") -> list[int]:
    """Round token counts (prefix tokens included) to multiples of ``multiple``, nested as they were.

    Untouched: full blocks (``tokens``), and blocks with no more than the ``prefix`` tokens, so also a last block that is cut to
    what the head reads. Where the lower multiple has no room for the prefix tokens the upper one is taken; where the upper one
    is above ``tokens`` the block becomes full. ``nearest`` rounds halves up. Raises ``ValueError`` for a ``multiple`` below 1
    and for counts above ``tokens``.
    """
    if multiple < 1:
        raise ValueError(f"token counts cannot be rounded to multiples of {multiple}")
    if counts and not 1 <= min(counts) <= max(counts) <= tokens:
        raise ValueError(f"token counts must be from 1 to {tokens}")
    return [_snapped(count, multiple, tokens, prefix, rounding) for count in counts]


def _snapped(count: int, multiple: int, tokens: int, prefix: int, rounding: Rounding) -> int:
    # A monotone function of the count: that is what keeps nested counts nested.
    lower = count - count % multiple
    if count in (lower, tokens) or count <= prefix:
        return count
    upper = min(lower + multiple, tokens)
    if lower < max(prefix, 1):
        return upper
    up = rounding == "up" or (rounding == "nearest" and 2 * (count - lower) >= multiple)
    return upper if up else lower
