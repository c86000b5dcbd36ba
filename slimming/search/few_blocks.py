"""Counts that stay constant between a few blocks where tokens go: where these are, and how deep each cuts.

A ramp drops tokens in every block. Each merging block costs a CPU passes over the tokens, and few merging
blocks are often as accurate at equal MACs. With k blocks the tokens fall from N to e by the share ``(i / k)^s`` of the way on a
logarithmic scale behind the i-th of them; s says how the fall is shared out, and the budget fixes e. Blocks and s are found by
climbing, each trial judged by the KL divergence on a part of the calibration images.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal, TypeAlias

from patchslim.errors import BudgetUnreachable, UsageError
from slimming.search.costs import Cost
from slimming.search.profile import (
    CountSizes,
    ProfileEvaluator,
    SnappedCost,
    best_profile,
    check_reachable,
    curve,
    free_blocks,
    highest_end,
    least_count,
    snapped,
    with_head,
)

#: Where tokens go: after every block (ramp), the better of that and few blocks (auto), in so many blocks, or in these, from 1.
MergeBlocks: TypeAlias = Literal["ramp", "auto"] | int | tuple[int, ...]
#: How the fall is shared out: below 1 the first block takes more than the last.
SHAPES = (0.5, 0.7, 1.0, 1.4, 2.0)
_EVEN = 2
#: Trials of one search, each on a part of the images: all together about one dense pass over all of them.
TRIALS = 8
#: Merging blocks that ``auto`` compares with the ramp, evenly spread. Searched places diverged less before the fit on the
#: models of ``benchmarks.accuracy``, and more after it.
AUTO = 3
#: They may diverge so much more than the ramp before the fit, which mends few deep merges better than many small ones.
WORTH = 1.05
#: A CPU's kernels for bfloat16 and 8 bits (oneDNN's) take the rows of a product in blocks of a size that divides their number,
#: ``TILE`` at most. Of one image the rows are its tokens: with 137 of them, a prime, such a product takes a third longer than
#: with 136. So the counts of ``auto`` that are above ``TILE`` are multiples of ``TILED``: these have a large divisor.
TILE, TILED = 64, 4
#: Share of the dense cost that such rounding may leave unused; where it would leave more, counts are exact.
WASTE = 0.005
#: KL divergence, nats, that is next to nothing: in the tables of ``benchmarks.accuracy`` merging loses at most 65 points of
#: top-1 a nat, which makes 0.13 points. Few blocks that diverge by less are taken, and no ramp is searched.
NEGLIGIBLE = 0.002


def parse_merge_blocks(text: str) -> MergeBlocks:
    """Return what ``--merge-blocks`` says: ramp, auto, a number of blocks, or a list of blocks (``7,`` for one).

    Raises ``UsageError``.
    """
    if text in ("ramp", "auto"):
        return text  # type: ignore[return-value]
    words = text.removesuffix(",").split(",")
    if not all(word.isascii() and word.isdigit() and 0 < int(word) < 10_000 for word in words):
        raise UsageError(f"--merge-blocks {text}: must be auto, ramp, a number of blocks, or blocks counted from 1, as 4,8")
    numbers = tuple(int(word) for word in words)
    if len(numbers) == 1 and not text.endswith(","):
        return numbers[0]
    if sorted(set(numbers)) != list(numbers):
        raise UsageError(f"--merge-blocks {text}: blocks must be given once each, the first block first")
    return numbers


@dataclass(frozen=True)
class Steps:
    """The blocks behind which tokens go, counted from 1, and how the fall is shared out (its place in ``SHAPES``)."""

    places: tuple[int, ...]
    shape: int = _EVEN

    def counts(self, sizes: CountSizes, end: int) -> list[int]:
        """Return the counts of all blocks, prefix tokens included, that end at ``end``."""
        falls = [sum(place <= block for place in self.places) for block in range(1, free_blocks(sizes) + 1)]
        shares = [(fall / len(self.places)) ** SHAPES[self.shape] for fall in falls]
        tokens = sizes.tokens
        # Patches fall to nothing where only prefix tokens stay: half a patch stands for none on a logarithmic scale.
        patches, last = tokens - sizes.prefix, max(end - sizes.prefix, 0.5)
        return with_head(
            sizes,
            [
                tokens if share == 0 else end if share == 1 else sizes.prefix + round(patches * (last / patches) ** share)
                for share in shares
            ],
        )

    def neighbours(self, last: int, *, moves: bool) -> Iterator[Steps]:
        """Yield what differs by one step: all places or one of them moved by a block (with ``moves``), or the shape."""
        places = self.places
        if moves:
            shifted = [tuple(place + by for place in places) for by in (-1, 1)]
            for index in range(len(places) if len(places) > 1 else 0):
                shifted += [(*places[:index], places[index] + by, *places[index + 1 :]) for by in (-1, 1)]
            for moved in shifted:
                if moved[0] >= 1 and moved[-1] <= last and all(a < b for a, b in pairwise(moved)):
                    yield Steps(moved, self.shape)
        if len(places) > 1:
            for shape in (self.shape - 1, self.shape + 1):
                if 0 <= shape < len(SHAPES):
                    yield Steps(places, shape)


def spread_evenly(sizes: CountSizes, blocks: int) -> Steps:
    """Return ``blocks`` places evenly spread over a model. Raises ``UsageError`` where it has fewer blocks."""
    free = free_blocks(sizes)
    if blocks > free:
        raise UsageError(f"--merge-blocks {blocks}: the model has {free} blocks that tokens can go in")
    return Steps(tuple(max(1, round((index + 1) * (free + 1) / (blocks + 1))) for index in range(blocks)))


def steps_within(steps: Steps, sizes: CountSizes, cost: Cost, limit: float, multiple: int | None = 1) -> list[int] | None:
    """Return the counts of ``steps`` that keep as much as ``limit`` allows; None where they cannot meet it.

    They are multiples of ``multiple``; with None those above ``TILE`` are multiples of ``TILED``.
    """
    least = multiple or 1
    end = highest_end(sizes, SnappedCost(cost, sizes, least), limit, lambda end: steps.counts(sizes, end))
    if end is None:
        return None
    counts = snapped(sizes, steps.counts(sizes, end), least, "down")
    return _filled(counts if multiple else _tiled(counts, sizes), sizes, cost, limit, multiple)


def _tiled(counts: list[int], sizes: CountSizes) -> list[int]:
    """``counts`` with those between ``TILE`` and all tokens rounded down to multiples of ``TILED``."""
    inner = free_blocks(sizes) - (sizes.fixed_head is None)
    rounded = [count if count <= TILE or count == sizes.tokens else count - count % TILED for count in counts[:inner]]
    if sizes.fixed_head is not None or not rounded:
        return rounded + counts[inner:]
    return [*rounded, min(counts[-1], rounded[-1] - sizes.prefix)]


def tiled_ramp(counts: list[int], sizes: CountSizes, cost: Cost, limit: float) -> list[int]:
    """``counts`` of a ramp, rounded as ``TILE`` says; what that frees goes to the first blocks, a step each."""
    counts = _tiled(counts, sizes)
    for block, before in zip(range(free_blocks(sizes) - (sizes.fixed_head is None)), [sizes.tokens, *counts], strict=False):
        more = [*counts[:block], counts[block] + TILED, *counts[block + 1 :]]
        if TILE <= counts[block] <= before - TILED and cost.of(more) <= limit:
            counts = more
    return counts


def _filled(counts: list[int], sizes: CountSizes, cost: Cost, limit: float, multiple: int | None) -> list[int]:
    """What is left of the budget, spent on the first blocks of equal counts that it pays for, all of them alike."""
    inner, before = free_blocks(sizes) - (sizes.fixed_head is None), sizes.tokens
    for count, blocks in [(count, len(list(run))) for count, run in groupby(counts[:inner])]:
        start, raised = counts.index(count), count
        while (higher := raised + (multiple or (TILED if raised >= TILE else 1))) < before:
            more = [*counts[:start], *[higher] * blocks, *counts[start + blocks :]]
            if cost.of(more) > limit:
                break
            counts, raised = more, higher
        before = raised
    return counts


@dataclass(frozen=True)
class Choice:
    """Counts that meet a budget; ``reason`` says what they were chosen for, where there was more than one family."""

    counts: list[int]
    reason: str | None = None


@dataclass(frozen=True)
class FewBlocks:
    """Searches counts that fall in a few blocks alone and cost at most ``limit``, snapped to ``multiple``."""

    evaluator: ProfileEvaluator
    cost: Cost
    limit: float
    multiple: int = 1

    def counts(self, steps: Steps, *, tiled: bool = False) -> list[int] | None:
        """Return the counts of ``steps`` that keep as much as the limit allows; None where they cannot meet it.

        ``tiled``: for a CPU's kernels, as ``TILE`` says, unless multiples of something else are asked for.
        """
        exact = steps_within(steps, self.evaluator, self.cost, self.limit, self.multiple)
        if exact is None or not tiled or self.multiple > 1:
            return exact
        return self._rounded(steps_within(steps, self.evaluator, self.cost, self.limit, None), exact)

    def _rounded(self, counts: list[int] | None, exact: list[int]) -> list[int]:
        """``counts``, which ``exact`` was rounded to, unless they leave too much of the budget."""
        least = min(self.cost.of(exact), self.limit - WASTE * self.cost.dense())
        return exact if counts is None or self.cost.of(counts) < least else counts

    def climb(self, start: Steps, *, moves: bool = True) -> list[int]:
        """Return the best counts that ``TRIALS`` trials come to from ``start``; without ``moves`` its places stay.

        Raises ``BudgetUnreachable``.
        """
        tried: dict[tuple[int, ...], float] = {}

        def merit(steps: Steps) -> float:
            counts = self.counts(steps)
            if counts is None:
                return math.inf
            if tuple(counts) not in tried:
                tried[tuple(counts)] = self.evaluator.quick_divergence(counts)
            return tried[tuple(counts)]

        best = self._reachable(start, moves=moves)
        least, better = merit(best), True
        while better:
            better = False
            for steps in best.neighbours(free_blocks(self.evaluator), moves=moves):
                if len(tried) < TRIALS and (found := merit(steps)) < least:
                    best, least, better = steps, found, True
                    break
        return self.counts(best) or []

    def _reachable(self, steps: Steps, *, moves: bool) -> Steps:
        """``steps``, or the same places further to the front as far as the limit asks for."""
        while self.counts(steps) is None:
            front = tuple(max(place - 1, index + 1) for index, place in enumerate(steps.places))
            if not moves or front == steps.places:
                least, dense = self.cost.of(steps.counts(self.evaluator, least_count(self.evaluator))), self.cost.dense()
                raise BudgetUnreachable(
                    f"{1 - self.limit / dense:.1%} of the {self.cost.unit} cannot be removed behind "
                    f"{_named(steps.places)}: no patches after that remove {1 - least / dense:.1%}; take earlier blocks"
                )
            steps = Steps(front, steps.shape)
        return steps

    def chosen(self, where: MergeBlocks) -> Choice:
        """Return the counts that ``where`` asks for. Raises ``BudgetUnreachable`` and ``UsageError``."""
        evaluator, cost = self.evaluator, SnappedCost(self.cost, self.evaluator, self.multiple)
        if where == "ramp":
            return Choice(best_profile(evaluator, self.cost, self.limit, self.multiple).counts)
        check_reachable(evaluator, cost, self.limit)
        exact = curve(evaluator, 1.0, evaluator.tokens)
        if cost.of(exact) <= self.limit:
            return Choice(exact)
        if isinstance(where, tuple):
            if where[-1] > (free := free_blocks(evaluator)):
                raise UsageError(f"--merge-blocks {','.join(map(str, where))}: tokens can go in the blocks 1 to {free}")
            return Choice(self.climb(Steps(where), moves=False), f"as asked, in {_named(where)}")
        if isinstance(where, int):
            counts = self.climb(spread_evenly(self.evaluator, where))
            return Choice(counts, f"{where} as asked; the best places tried are {_named(places_of(counts, evaluator))}")
        return self._auto()

    def _auto(self) -> Choice:
        """Few blocks, unless the ramp diverges clearly less."""
        evaluator, few, told = self.evaluator, math.inf, ""
        counts: list[int] = []
        if free_blocks(evaluator) >= AUTO:
            with contextlib.suppress(BudgetUnreachable):
                counts = self.counts(self._reachable(spread_evenly(evaluator, AUTO), moves=True), tiled=True) or []
                few = evaluator.divergence(counts)
                told = f"in {_named(places_of(counts, evaluator))}"
        if few <= NEGLIGIBLE:
            return Choice(counts, f"{told}: KL {few:.4f} before the fit")
        ramp = best_profile(evaluator, self.cost, self.limit, self.multiple)
        if ramp.divergence is None:
            return Choice(ramp.counts)
        all_blocks = ramp.counts
        if self.multiple == 1:
            all_blocks = self._rounded(tiled_ramp(all_blocks, evaluator, self.cost, self.limit), all_blocks)
        if few <= WORTH * ramp.divergence:
            return Choice(
                counts, f"{told}: KL {few:.4f} before the fit, and {ramp.divergence:.4f} with tokens going in every block"
            )
        return Choice(
            all_blocks, f"in every block: KL {ramp.divergence:.4f} before the fit" + (f"; {told} {few:.4f}" if told else "")
        )


def places_of(counts: list[int], sizes: CountSizes) -> tuple[int, ...]:
    """Return the blocks that have fewer tokens than the one before, from 1, but for a last one that the head fixes."""
    before = [sizes.tokens, *counts]
    return tuple(block + 1 for block in range(free_blocks(sizes)) if counts[block] < before[block])


def _named(places: tuple[int, ...]) -> str:
    return f"block{'s' if len(places) != 1 else ''} {', '.join(map(str, places))}"
