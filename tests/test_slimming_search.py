"""The top-down search: its bisection against a linear scan, its bounds, its budget, and its memory."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from models_factory import build, images_for

from slimming.door import BudgetUnreachable, InputRejected
from slimming.plan import macs_of
from slimming.search import TopDownSearch
from slimming.store import TensorStore

IMAGES = 20


def search_of(kind: str = "class_token", **options: Any) -> TopDownSearch:
    model = build(kind, patch_size=8)  # 36 patches
    images = images_for(model, IMAGES)
    return TopDownSearch(model, iter(images.split(7)), IMAGES, **{"step": 3, **options})


def linear_scan(
    search: TopDownSearch, block: int, base: list[int], above: list[int], ranking: list[int], eps: float
) -> list[int]:
    """Algorithm 1 as printed: raise r by r' until E is within the tolerance."""
    for index in range(math.ceil(search.tokens / search.step) + 1):
        kept = sorted({*base, *ranking[: index * search.step]})
        if search.error(block, kept, above) <= eps:
            return kept
    raise AssertionError("every token kept has no error")


@pytest.mark.parametrize("hint", [None, 0, 3, 12, 99])
@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_the_galloping_bisection_is_the_linear_scan(mode: Any, hint: int | None) -> None:
    search = search_of(mode=mode)
    compared = 0
    for block, seed in itertools.product(range(3), range(4)):
        ranking = torch.randperm(search.tokens, generator=torch.Generator().manual_seed(seed)).tolist()
        above = sorted({0, *ranking[:4]})
        grid = range(math.ceil(search.tokens / search.step) + 1)
        errors = [search.error(block, sorted({*above, *ranking[: r * search.step]}), above) for r in grid]
        for eps in [0.0, *(error * 1.0001 for error in errors[:-1]), errors[0] * 2]:
            search._hints = {} if hint is None else {block: hint}
            found, error = search._fewest(block, above, above, ranking, eps)
            assert error <= eps
            fits = [value <= eps for value in errors]
            if fits == sorted(fits):  # E crosses the tolerance once, as the bisection takes for granted
                compared += 1
                assert found == linear_scan(search, block, above, above, ranking, eps)
    assert compared > 50


@pytest.mark.parametrize("hint", range(14))
def test_the_bisection_on_any_falling_step(hint: int) -> None:
    class Stairs(TopDownSearch):
        def error(self, block: int, kept: list[int], above: list[int]) -> float:
            return float(self.tokens - len(kept))

    search = search_of()
    search.__class__ = Stairs
    ranking = list(range(search.tokens))
    for eps in range(search.tokens + 1):
        search._hints = {0: hint}
        found, _ = search._fewest(0, [0], [0], ranking, eps)
        assert found == linear_scan(search, 0, [0], [0], ranking, eps)


@pytest.mark.parametrize("kind", ["class_token", "distilled", "registers"])
@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_every_error_is_within_the_tolerance_and_masks_are_nested(mode: Any, kind: str) -> None:
    search = search_of(kind, mode=mode)
    dropped = set()
    for tolerance in (1e-4, 1e-3, 1e-2, 1e-1):
        found = search.by_tolerance(tolerance)
        assert all(error <= tolerance for error in found.errors)
        for block, (kept, after) in enumerate(zip(found.kept, found.kept[1:], strict=False)):
            assert set(after) <= set(kept)
            assert set(range(search.prefix)) <= set(kept)
            assert found.errors[block] == search.error(block, kept, after)
        assert found.kept[-1] == search.head
        dropped.add(sum(map(len, found.kept)))
    assert len(dropped) > 2


def test_the_error_is_the_definition_written_out() -> None:
    model = build(patch_size=8)
    images = images_for(model, IMAGES)
    search = TopDownSearch(model, iter([images]), IMAGES)
    kept, above = [0, 3, 5, 9, 20], [0, 5, 9]
    tokens = model._pos_embed(model.patch_embed(images))
    first = model.blocks[0](tokens)
    dense = model.blocks[1](first)
    slim = model.blocks[1](first[:, kept])[:, [0, 2, 3]]
    each = [(slim[i] - dense[i, above]).norm() ** 2 / dense[i, above].norm() ** 2 for i in range(IMAGES)]
    assert search.error(0, kept, above) == pytest.approx(float(sum(each) / IMAGES), rel=1e-4)


@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_tolerance_0_cuts_the_exact_last_block_only(mode: Any) -> None:
    search = search_of(mode=mode)
    found = search.by_tolerance(0)
    assert found.kept == [list(range(37))] * 3 + [[0]]
    assert found.errors == [0.0] * 4


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("asked", [0.25, 0.4, 0.55])
def test_a_budget_is_met_and_hardly_exceeded(mode: Any, layout: Any, asked: float) -> None:
    """Removal is a staircase in the tolerance, with steps of some per cent in so small a model: no other step is closer."""
    search = search_of(mode=mode, layout=layout, step=1)
    found = search.by_budget(asked)
    counts = [len(kept) for kept in found.kept]
    removed = 1 - macs_of(counts, 37, search.geometry, mode, layout) / macs_of([37] * 4, 37, search.geometry)
    assert removed == pytest.approx(search.reduction(found.kept))
    steps = [search.reduction(search.by_tolerance(math.exp(-10 + 0.1 * step)).kept) for step in range(80)]
    assert asked <= removed <= min(step for step in steps if step >= asked) + 0.02
    assert removed <= asked + 0.06
    assert all(error <= found.tolerance for error in found.errors)


def test_a_budget_beyond_the_prefix_tokens_is_unreachable() -> None:
    search = search_of()
    most = 1 - macs_of([1] * 4, 37, search.geometry) / macs_of([37] * 4, 37, search.geometry)
    with pytest.raises(BudgetUnreachable, match=f"{most:.1%}") as raised:
        search.by_budget(most + 0.01)
    assert raised.value.exit_code == 6
    at_the_end = search.by_budget(most - 1e-9)
    assert [len(kept) for kept in at_the_end.kept] == [1] * 4


def test_no_budget_costs_the_last_block_only() -> None:
    assert [len(kept) for kept in search_of().by_budget(0.0).kept] == [37, 37, 37, 1]


def test_two_searches_are_identical() -> None:
    assert search_of().by_budget(0.4) == search_of().by_budget(0.4)


def spills() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("patchslim-*.f32"))


@pytest.mark.parametrize("bound", [1, 40_000])
def test_spilling_changes_nothing_and_leaves_nothing(bound: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted = search_of().by_budget(0.4)
    search = search_of(bound=bound)
    assert search.by_budget(0.4) == wanted
    assert search.store.spilled > 0
    assert search.store.held <= bound
    assert not spills()
    search.close()
    assert not any(tmp_path.iterdir())


def test_the_state_held_is_the_features_and_one_walks_grams() -> None:
    search = search_of()
    features = search.store.held
    assert features == 4 * (5 * IMAGES * 37 * 48 + 4 * IMAGES * 37)
    for _ in range(3):
        search.by_tolerance(1e-3)
        assert search.store.held == features
    search.close()
    assert search.store.held == 0


def test_the_store_counts_what_lives() -> None:
    store = TensorStore(bound=100)
    first = store.empty(5, 4)
    second = store.empty(3, 4)
    assert (store.held, store.spilled) == (80, 48)
    second.fill_(2)
    view = first[1:]
    del first
    assert store.held == 80
    del view
    assert store.held == 0
    assert store.empty(5, 5).shape == (5, 5)
    assert (store.spilled, float(second.sum())) == (48, 24)


def test_features_that_overflow_are_refused() -> None:
    model = build(patch_size=8)
    model.blocks[2].mlp.fc2.weight.fill_(1e30)
    model.blocks[3].mlp.fc2.weight.fill_(1e30)
    with pytest.raises(InputRejected, match="not finite"):
        TopDownSearch(model, iter([images_for(model, 2) * 1e10]), 2)


def test_features_that_are_all_zero_end() -> None:
    model = build(patch_size=8)
    for parameter in model.parameters():
        parameter.zero_()
    search = TopDownSearch(model, iter([images_for(model, 2)]), 2)
    assert search.reduction(search.by_budget(0.5).kept) >= 0.5
