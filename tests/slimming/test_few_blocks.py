"""Counts that fall in a few blocks alone: as they are asked for, within the budget, and the best that a climb finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.options import ExportOptions
from patchslim.choices import Layout
from patchslim.errors import BudgetUnreachable, UsageError
from patchslim.macs import Geometry, check_counts
from slimming.run import SlimmingOptions
from slimming.search.budget import Budget
from slimming.search.costs import MacsCost
from slimming.search.counts import counts_within
from slimming.search.few_blocks import (
    AUTO,
    NEGLIGIBLE,
    TILE,
    TILED,
    TRIALS,
    WASTE,
    WORTH,
    FewBlocks,
    MergeBlocks,
    Steps,
    parse_merge_blocks,
    places_of,
    spread_evenly,
    tiled_ramp,
)
from slimming.search.profile import profile_within
from slimming.search.request import PlanRequest
from tests.helpers.made_evaluators import Made, macs


def search(evaluator: Made, removed: float = 0.45, multiple: int = 1) -> FewBlocks:
    cost = macs(evaluator)
    return FewBlocks(evaluator, cost, (1 - removed) * cost.dense(), multiple)


def towards(places: tuple[int, ...]) -> Callable[[Sequence[int]], float]:
    """A divergence that grows with the distance of the blocks in which tokens go from ``places``."""

    def merit(counts: Sequence[int]) -> float:
        found = places_of(list(counts), Made(197, 12, 1))
        return 1.0 + (sum(abs(a - b) for a, b in zip(found, places, strict=True)) if len(found) == len(places) else 100.0)

    return merit


@settings(max_examples=150, deadline=None)
@given(
    st.integers(20, 200), st.integers(3, 12), st.integers(1, 3), st.floats(0.05, 0.9), st.sampled_from([1, 8]), st.booleans()
)
def test_counts_fall_in_so_many_blocks_and_fill_the_budget(
    tokens: int, depth: int, blocks: int, removed: float, multiple: int, fixed: bool
) -> None:
    evaluator = Made(tokens, depth, 2, 2 if fixed else None)
    few = search(evaluator, removed, multiple)
    try:
        counts = few.chosen(min(blocks, depth - 1)).counts
    except BudgetUnreachable:
        return
    check_counts(counts, tokens, depth)
    assert few.cost.of(evaluator.nested(counts)) <= few.limit
    assert sum(after < before for before, after in pairwise([tokens, *counts[: depth - 1]])) <= blocks
    if multiple == 1 and len(places_of(counts, evaluator)) == 1 and fixed:  # one count alone: not one token more anywhere
        raised = [count if count == tokens else count + 1 for count in counts[:-1]]
        assert few.cost.of([*raised, counts[-1]]) > few.limit


def test_counts_are_the_formula() -> None:
    evaluator = Made(65, 8, 1)
    assert Steps((3, 6)).counts(evaluator, 17) == [65, 65, 33, 33, 33, 17, 17, 1]  # of 64 patches half, and half of these
    assert Steps((3, 6), 0).counts(evaluator, 17) == [65, 65, round(1 + 64 * 0.25**0.5**0.5), 25, 25, 17, 17, 1]
    assert Steps((1,)).counts(evaluator, 1) == [1] * 8
    assert Steps((4,)).counts(evaluator, 65) == [65] * 7 + [1]
    assert Steps((2, 4)).counts(Made(69, 4, 5, None), 21) == [69, 37, 37, 16]  # pooled: the prefix tokens end below


@pytest.mark.parametrize("best", [(3, 7), (5, 8), (4, 9), (2, 8)])
def test_the_climb_finds_places_near_where_it_starts(best: tuple[int, int]) -> None:
    evaluator = Made(197, 12, 1, merit=towards(best))
    choice = search(evaluator).chosen(2)
    assert places_of(choice.counts, evaluator) == best
    assert choice.reason == f"2 as asked; the best places tried are blocks {best[0]}, {best[1]}"
    assert not evaluator.asked
    assert len(evaluator.asked_quickly) == len({tuple(counts) for counts in evaluator.asked_quickly}) <= TRIALS


def test_on_a_small_model_the_climb_is_as_good_as_trying_all() -> None:
    """The oracle: every pair of places and every shape, by a merit with one valley."""
    evaluator = Made(65, 6, 1, merit=lambda counts: sum((count / 65 - 0.55) ** 2 for count in counts[:-1]))
    few = search(evaluator, 0.4)
    found = few.chosen(2).counts
    every = [few.counts(Steps(places, shape)) for places in combinations(range(1, 6), 2) for shape in range(5)]
    best = min(evaluator.merit(counts) for counts in every if counts is not None)
    assert evaluator.merit(found) <= 1.1 * best


def test_given_blocks_stay() -> None:
    evaluator = Made(197, 12, 1, merit=towards((4, 8)))
    choice = search(evaluator).chosen((2, 5, 11))
    assert places_of(choice.counts, evaluator) == (2, 5, 11)
    assert choice.reason == "as asked, in blocks 2, 5, 11"


def test_places_move_to_the_front_where_the_budget_asks_for_that() -> None:
    evaluator = Made(197, 12, 1)
    few = search(evaluator, 0.85)
    assert few.counts(spread_evenly(evaluator, 1)) is None
    counts = few.chosen(1).counts
    assert few.cost.of(counts) <= few.limit
    with pytest.raises(
        BudgetUnreachable, match=r"85.0% of the MACs cannot be removed behind block 9: no patches after that remove 32.4%"
    ) as no:
        few.chosen((9,))
    assert no.value.exit_code == 6


@pytest.mark.parametrize(
    ("ramp", "few", "places"),
    [(1.0, 0.9, 3), (1.0, WORTH - 0.001, 3), (1.0, WORTH + 0.001, 11), (1.0, 1.2, 11), (NEGLIGIBLE / 2, NEGLIGIBLE * 1.01, 11)],
)
def test_auto_takes_three_blocks_unless_the_ramp_is_clearly_better(ramp: float, few: float, places: int) -> None:
    evaluator = Made(197, 12, 1)
    evaluator.merit = lambda counts: few if len(places_of(list(counts), evaluator)) == AUTO else ramp
    choice = search(evaluator).chosen("auto")
    assert len(places_of(choice.counts, evaluator)) == places
    assert choice.reason is not None
    assert f"KL {few if places == AUTO else ramp:.4f} before the fit" in choice.reason
    if places == 11:
        exact = profile_within(evaluator, macs(evaluator), search(evaluator).limit)
        assert choice.counts == tiled_ramp(exact, evaluator, macs(evaluator), search(evaluator).limit)
        assert choice.reason.startswith("in every block: ")


@settings(max_examples=150, deadline=None)
@given(st.integers(20, 600), st.integers(4, 12), st.floats(0.05, 0.9), st.sampled_from([1, 8]), st.booleans())
def test_counts_of_auto_suit_the_blocks_of_a_cpus_kernels(
    tokens: int, depth: int, removed: float, multiple: int, fixed: bool
) -> None:
    evaluator = Made(tokens, depth, 2, 2 if fixed else None)
    few = search(evaluator, removed, multiple)
    steps = spread_evenly(evaluator, AUTO)
    plain, tiled = few.counts(steps), few.counts(steps, tiled=True)
    assert (plain is None) == (tiled is None)
    if plain is None or tiled is None:
        return
    check_counts(tiled, tokens, depth)
    assert few.cost.of(evaluator.nested(tiled)) <= few.limit
    assert few.cost.of(tiled) >= min(few.cost.of(plain), few.limit - WASTE * few.cost.dense())
    if tiled == plain:
        return
    inner = depth - 1
    assert multiple == 1  # else they are as asked
    assert all(count == tokens or count <= TILE or count % TILED == 0 for count in tiled[:inner])
    first = next((count for count in tiled[:inner] if count < tokens), None)
    if fixed and first is not None:  # the first merging block has no room to keep more
        more = first + (TILED if first >= TILE else 1)
        grown = [more if count == first else count for count in tiled[:inner]]
        assert more >= tokens or few.cost.of([*grown, tiled[-1]]) > few.limit


@settings(max_examples=150, deadline=None)
@given(st.integers(20, 600), st.integers(2, 12), st.floats(0.05, 0.9), st.booleans())
def test_a_ramp_that_auto_takes_is_as_long_within_its_budget(tokens: int, depth: int, removed: float, fixed: bool) -> None:
    evaluator = Made(tokens, depth, 2, 2 if fixed else None)
    few = search(evaluator, removed)
    try:
        exact = profile_within(evaluator, few.cost, few.limit)
    except BudgetUnreachable:
        return
    counts = tiled_ramp(exact, evaluator, few.cost, few.limit)
    check_counts(counts, tokens, depth)
    assert few.cost.of(evaluator.nested(counts)) <= few.limit
    for count, old in zip(counts[: depth - 1], exact, strict=False):
        assert count == old if old <= TILE or old == tokens else count % TILED == 0
    assert all(abs(count - old) <= TILED for count, old in zip(counts, exact, strict=True))


def test_a_prime_number_of_tokens_is_avoided() -> None:
    cost = MacsCost(197, 12, Geometry(embed_dim=192, mlp_hidden_dim=768, patch_macs=28_901_376, head_macs=1_920), merged=True)
    few = FewBlocks(Made(197, 12, 1), cost, 0.55 * cost.dense())
    steps = spread_evenly(few.evaluator, AUTO)
    assert few.counts(steps) == [197, 197, 137, 137, 137, 94, 94, 94, 65, 65, 65, 1]
    assert few.counts(steps, tiled=True) == [197, 197, 140, 140, 140, 92, 92, 92, 64, 64, 64, 1]


def test_where_few_blocks_cost_next_to_nothing_no_ramp_is_searched() -> None:
    evaluator = Made(197, 12, 1, merit=lambda counts: NEGLIGIBLE)
    choice = search(evaluator).chosen("auto")
    assert choice.reason == f"in blocks 3, 6, 9: KL {NEGLIGIBLE:.4f} before the fit"
    assert places_of(choice.counts, evaluator) == (3, 6, 9)
    assert (evaluator.asked, evaluator.asked_quickly) == ([choice.counts], [])


@pytest.mark.parametrize("depth", [2, 3])
def test_auto_is_the_ramp_where_a_model_is_too_short_for_few_blocks(depth: int) -> None:
    evaluator = Made(37, depth, 1)
    few = search(evaluator)
    assert few.chosen("auto").counts == profile_within(evaluator, macs(evaluator), few.limit)


@pytest.mark.parametrize("multiple", [1, 8])
def test_what_is_left_of_the_budget_is_spent(multiple: int) -> None:
    """The oracle: no run of equal counts can be raised any more, the first ones first."""
    evaluator = Made(197, 12, 1)
    few = search(evaluator, multiple=multiple)
    counts = few.counts(Steps((3, 6, 9)))
    assert counts is not None
    assert few.cost.of(counts) <= few.limit
    first, second, third = places_of(counts, evaluator)
    for start, stop in pairwise((first - 1, second - 1, third - 1, 11)):
        more = [count + multiple * (start <= block < stop) for block, count in enumerate(counts)]
        assert few.cost.of(more) > few.limit or more[start] >= more[start - 1]


def test_a_budget_that_the_last_block_meets_drops_nothing_else() -> None:
    evaluator = Made(37, 4, 1)
    for where in ("auto", 2, (1,)):
        asked: MergeBlocks = where  # type: ignore[assignment]
        assert search(evaluator, 0.0).chosen(asked).counts == [37, 37, 37, 1]
    assert not evaluator.asked_quickly


def test_counts_are_a_ramp_unless_more_is_asked_for() -> None:
    evaluator = Made(197, 12, 1)
    cost = macs(evaluator)
    choice = counts_within(evaluator, Budget("macs-reduction", 0.45), cost)
    assert choice.counts == profile_within(evaluator, cost, 0.55 * cost.dense())
    assert choice.reason is None
    assert not evaluator.asked_quickly


def test_where_tokens_go_by_default() -> None:
    """In few blocks where tokens are merged by a product; a cut that drops or sums them costs next to nothing."""
    merging = PlanRequest(score="similarity")
    dropping = PlanRequest(score="paper")
    for layout in get_args(Layout):
        few = "auto" if layout == "split" else "ramp"
        assert replace(merging, layout=layout).where == replace(dropping, layout=layout, summary=True).where == few
        assert replace(dropping, layout=layout).where == "ramp"
        assert replace(merging, layout=layout, merge_blocks="ramp").where == "ramp"
        assert replace(dropping, layout=layout, merge_blocks="auto").where == "auto"


@pytest.mark.parametrize(
    ("text", "meant"), [("auto", "auto"), ("ramp", "ramp"), ("2", 2), ("7,", (7,)), ("3,7,10", (3, 7, 10)), ("3,7,", (3, 7))]
)
def test_what_can_be_asked_for(text: str, meant: MergeBlocks) -> None:
    assert parse_merge_blocks(text) == meant
    assert SlimmingOptions(merge_blocks=text).request().merge_blocks == meant


@pytest.mark.parametrize("text", ["", "few", "0", "-1", "3,,7", "3,0", "1.5", "²", "3, 7", "3,7,x", "99999"])
def test_what_is_no_list_of_blocks(text: str) -> None:
    with pytest.raises(UsageError, match=r"--merge-blocks .*: must be auto, ramp, a number of blocks, or blocks"):
        SlimmingOptions(merge_blocks=text).check()


@pytest.mark.parametrize(
    ("options", "given", "named"),
    [
        (SlimmingOptions, {"merge_blocks": "7,3"}, "--merge-blocks 7,3: blocks must be given once each, the first block first"),
        (SlimmingOptions, {"merge_blocks": "3,3"}, "once each"),
        (SlimmingOptions, {"merge_blocks": "2", "tokens": "9,9,1"}, "--merge-blocks and --tokens both say"),
        (SlimmingOptions, {"merge_blocks": "2", "tolerance": 0.1, "score": "paper"}, "--merge-blocks and --tolerance both say"),
        (SlimmingOptions, {"merge_blocks": "2", "score": "uniform"}, "--score uniform has one count for all blocks"),
        (ExportOptions, {"merge_blocks": "2", "dense": True}, "--dense and --merge-blocks contradict each other"),
    ],
)
def test_what_does_not_go_together(options: Any, given: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        options(**given).check()


def test_blocks_that_the_model_lacks() -> None:
    few = search(Made(65, 8, 1))
    with pytest.raises(UsageError, match="--merge-blocks 8: the model has 7 blocks that tokens can go in"):
        few.chosen(8)
    with pytest.raises(UsageError, match="--merge-blocks 3,8: tokens can go in the blocks 1 to 7"):
        few.chosen((3, 8))
    assert math.isfinite(few.cost.of(few.chosen(7).counts))
