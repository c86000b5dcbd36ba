"""Token counts under a budget: nested, within the limit and hardly below it, and the best of their family by any merit."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchslim.errors import BudgetUnreachable
from patchslim.macs import check_counts
from slimming.search.costs import Cost
from slimming.search.profile import POWERS, curve, profile_within, snapped, uniform_within
from tests.helpers.made_evaluators import Made, Milliseconds, macs


@st.composite
def cases(draw: st.DrawFn) -> tuple[Made, Cost, float]:
    """An evaluator, a cost and the share of the dense cost that may be spent."""
    prefix = draw(st.integers(0, 5))
    fixed = draw(st.sampled_from([None, 1])) if prefix else None
    sign = draw(st.sampled_from([-1, 1]))
    evaluator = Made(prefix + draw(st.integers(4, 60)), draw(st.integers(2, 12)), prefix, fixed, draw(st.booleans()))
    evaluator.merit = lambda counts: sign * counts[0]
    cost: Cost = macs(evaluator, draw(st.sampled_from(["compact", "stale"])))
    if draw(st.booleans()):
        rng = random.Random(draw(st.integers(0, 99)))
        cost = Milliseconds(evaluator.tokens, tuple(rng.uniform(0.1, 3) for _ in range(evaluator.depth)))
    return evaluator, cost, draw(st.floats(0.05, 1.0))


def found_or_none(evaluator: Made, cost: Cost, limit: float, multiple: int = 1) -> list[int] | None:
    """The profile; where there is none, no point of the family is within the limit."""
    try:
        return profile_within(evaluator, cost, limit, multiple)
    except BudgetUnreachable:
        least = curve(evaluator, 0.0, evaluator.prefix + (evaluator.fixed_head is None))
        assert cost.of(snapped(evaluator, least, multiple, "down")) > limit
        return None


@settings(max_examples=150, deadline=None)
@given(cases())
def test_counts_are_nested_and_fill_the_budget(case: tuple[Made, Cost, float]) -> None:
    evaluator, cost, share = case
    limit = share * cost.dense()
    if (counts := found_or_none(evaluator, cost, limit)) is None:
        return
    check_counts(counts, evaluator.tokens, evaluator.depth)
    assert evaluator.nested(counts) == counts
    assert cost.of(counts) <= limit
    assert min(counts[:-1]) >= evaluator.prefix
    assert counts[-1] == evaluator.fixed_head or evaluator.fixed_head is None
    for block in range(evaluator.depth - (evaluator.fixed_head is not None)):  # not one more token anywhere
        if counts[block] < (evaluator.readable if block == evaluator.depth - 1 else evaluator.tokens):
            raised = list(counts)
            raised[block] += 1
            assert cost.of(evaluator.nested(raised)) > limit


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([2, 4, 8, 16]))
def test_rounded_counts_keep_the_limit(case: tuple[Made, Cost, float], multiple: int) -> None:
    evaluator, cost, share = case
    limit = share * cost.dense()
    if (counts := found_or_none(evaluator, cost, limit, multiple)) is None:
        return
    assert cost.of(evaluator.nested(counts)) <= limit
    assert evaluator.nested(counts) == counts
    for count in counts[:-1]:
        assert count % multiple == 0 or count in (evaluator.tokens, evaluator.prefix + (evaluator.fixed_head is None))
    if evaluator.fixed_head is None and counts[-1] < evaluator.tokens - evaluator.prefix:
        assert (
            (counts[-1] + evaluator.prefix) % multiple == 0
            or counts[-1] == 1
            or counts[-1] + evaluator.prefix == evaluator.tokens
        )


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([1, 8]))
def test_uniform_counts_are_one_number_as_large_as_fits(case: tuple[Made, Cost, float], multiple: int) -> None:
    evaluator, cost, share = case
    limit = share * cost.dense()
    try:
        counts = uniform_within(evaluator, cost, limit, multiple)
    except BudgetUnreachable:
        assert found_or_none(evaluator, cost, limit, multiple) is None
        return
    assert len(set(counts[:-1])) == 1
    assert evaluator.nested(counts) == counts
    assert cost.of(counts) <= limit
    if multiple == 1 and counts[0] < evaluator.tokens:
        assert cost.of(curve(evaluator, 0.0, counts[0] + 1)) > limit


@pytest.mark.parametrize("best", range(len(POWERS)))
@pytest.mark.parametrize("fixed", [1, None])
def test_the_climb_ends_at_the_least_divergence(best: int, fixed: int | None) -> None:
    """One that falls up to a power and rises past it, whichever power that is; no profile is judged twice."""
    evaluator = Made(197, 12, 1, fixed)
    cost = macs(evaluator)
    profiles: list[list[int]] = []
    for power in POWERS:
        alone = Made(197, 12, 1, fixed, merit=lambda counts: 0.0)
        profiles.append(_only(alone, cost, power))
    evaluator.merit = lambda counts: float(abs(profiles.index(list(counts)) - best))
    assert profile_within(evaluator, cost, 0.7 * cost.dense()) == profiles[best]
    assert len(evaluator.asked) == len({tuple(counts) for counts in evaluator.asked}) <= len(POWERS)


def _only(evaluator: Made, cost: Cost, power: float) -> list[int]:
    """The profile of one power, as large as the budget allows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimming.search.profile.POWERS", (power,))
        return profile_within(evaluator, cost, 0.7 * cost.dense())


def test_profiles_differ_and_keep_early_blocks_fuller_at_higher_powers() -> None:
    evaluator = Made(197, 12, 1)
    profiles = [_only(evaluator, macs(evaluator), power) for power in POWERS]
    firsts = [counts[0] for counts in profiles]
    assert firsts == sorted(firsts)
    assert len(set(firsts)) == len(POWERS)
    assert [counts[-2] for counts in profiles] == sorted((counts[-2] for counts in profiles), reverse=True)


def test_a_curve_is_the_formula() -> None:
    evaluator = Made(101, 5, 1)
    assert curve(evaluator, 1.0, 1) == [76, 51, 26, 1, 1]
    assert curve(evaluator, 2.0, 21) == [96, 81, 56, 21, 1]
    assert curve(evaluator, 0.0, 40) == [40, 40, 40, 40, 1]
    assert curve(Made(101, 4, 1, None), 1.0, 1) == [76, 51, 26, 1]
    assert curve(Made(101, 4, 5, None), 1.0, 21) == [81, 61, 41, 16]  # pooled: the prefix tokens end below
    assert curve(Made(101, 4, 5, None), 1.0, 101) == [101, 101, 101, 96]
    assert curve(Made(101, 4, 5, None, reads_prefix=True), 1.0, 101) == [101] * 4


@pytest.mark.parametrize("fixed", [1, 2, None])
def test_the_whole_budget_keeps_all_that_the_head_reads(fixed: int | None) -> None:
    evaluator = Made(37, 4, 2, fixed)
    cost = macs(evaluator)
    assert profile_within(evaluator, cost, cost.dense()) == [37, 37, 37, fixed or 35]
    assert not evaluator.asked


def test_an_impossible_budget_names_the_nearest_point() -> None:
    evaluator = Made(37, 4, 1)
    cost = macs(evaluator)
    least = cost.of([1] * 4)
    for within in (profile_within, uniform_within):
        with pytest.raises(BudgetUnreachable, match="cannot be removed") as raised:
            within(evaluator, cost, 0.999 * least)
        assert raised.value.exit_code == 6
        for part in (f"{1 - 0.999 * least / cost.dense():.1%} of the MACs", f"{1 - least / cost.dense():.1%}", f"{least:.4g}"):
            assert part in str(raised.value)
        assert within(evaluator, cost, least) == [1] * 4


def test_a_budget_that_no_usual_profile_meets_is_still_met() -> None:
    """Just above the least, even the earliest of the usual curves keeps too much."""
    evaluator = Made(197, 12, 1)
    cost = macs(evaluator)
    limit = cost.of([1] * 12) + 0.2 * (cost.of([2] * 11 + [1]) - cost.of([1] * 12))
    counts = profile_within(evaluator, cost, limit)
    assert cost.of(counts) <= limit
    assert all(after <= before for before, after in pairwise(counts))


def test_rounding_a_pooled_head_leaves_room_for_the_prefix() -> None:
    evaluator = Made(69, 4, 5, None)
    assert snapped(evaluator, [61, 41, 41, 16], 8, "down") == [56, 40, 40, 11]
    assert snapped(evaluator, [61, 41, 41, 16], 8, "up") == [64, 48, 48, 19]
    assert snapped(evaluator, [69, 69, 69, 64], 8, "down") == [69, 69, 69, 64]
    assert snapped(Made(69, 4, 5), [61, 41, 41, 1], 8) == [64, 40, 40, 1]
