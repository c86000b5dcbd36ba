"""Token counts rounded to a multiple."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimming.search.costs import snap


@st.composite
def roundings(draw: st.DrawFn) -> tuple[list[int], int, int, int, Any]:
    prefix, tokens = draw(st.integers(0, 6)), draw(st.integers(7, 300))
    counts = sorted(draw(st.lists(st.integers(max(prefix, 1), tokens), min_size=1, max_size=12)), reverse=True)
    head = [draw(st.integers(1, prefix))] if prefix and draw(st.booleans()) else []
    return [*counts, *head], draw(st.integers(1, 40)), tokens, prefix, draw(st.sampled_from(["down", "up", "nearest"]))


@given(roundings())
def test_rounded_counts_are_multiples_and_still_a_plan(case: tuple[list[int], int, int, int, Any]) -> None:
    counts, multiple, tokens, prefix, rounding = case
    found = snap(counts, multiple, tokens, prefix, rounding)
    assert found == sorted(found, reverse=True)
    assert snap(found, multiple, tokens, prefix, rounding) == found
    for before, after in zip(counts, found, strict=True):
        assert after == before if before == tokens or before <= prefix else after % multiple == 0 or after == tokens
        assert min(before, max(prefix, 1)) <= after <= tokens
        assert abs(after - before) < multiple
        if rounding == "up":
            assert after >= before
        elif rounding == "down" and before - before % multiple >= max(prefix, 1):
            assert after <= before
        elif rounding == "nearest" and before - before % multiple >= max(prefix, 1) and after != tokens:
            assert 2 * abs(after - before) <= multiple


def test_rounding_by_example() -> None:
    counts = [197, 196, 160, 153, 121, 12, 3, 1, 1]
    assert snap(counts, 8, 197, 1, "down") == [197, 192, 160, 152, 120, 8, 8, 1, 1]
    assert snap(counts, 8, 197, 1, "up") == [197, 197, 160, 160, 128, 16, 8, 1, 1]
    assert snap(counts, 8, 197, 1) == [197, 197, 160, 152, 120, 16, 8, 1, 1]
    assert snap([197, 7, 1], 4, 197, 5) == [197, 8, 1]  # 4 has no room for five prefix tokens
    with pytest.raises(ValueError, match="multiples of 0"):
        snap(counts, 0, 197, 1)
    with pytest.raises(ValueError, match="from 1 to 197"):
        snap([198], 8, 197, 1)
