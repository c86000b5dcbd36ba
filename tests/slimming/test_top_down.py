"""The top-down search: its bisection against a linear scan, its errors written out, its counts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from patchslim.errors import InputRejected
from slimming.search.features import ERROR_IMAGES
from slimming.search.scores import PaperScore
from slimming.search.top_down import TopDownSearch
from tests.helpers.searches import IMAGES, POOLED, counts_of, features_of, search_of, within
from tests.helpers.timm_models import build, images_for

pytestmark = pytest.mark.numeric


def linear_scan(
    search: TopDownSearch, block: int, base: list[int], above: list[int], ranking: list[int], eps: float
) -> list[int]:
    """Algorithm 1 as printed: raise r by r' until E is within the tolerance."""
    for index in range(math.ceil(len(ranking) / search.step) + 1):
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

    search = search_of(images=2)
    search.__class__ = Stairs
    ranking = list(range(search.tokens))
    for eps in range(search.tokens + 1):
        search._hints = {0: hint}
        found, _ = search._fewest(0, [0], [0], ranking, eps)
        assert found == linear_scan(search, 0, [0], [0], ranking, eps)


@pytest.mark.parametrize("kind", ["class_token", "distilled", "registers", *POOLED])
@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_every_error_is_within_the_tolerance_and_masks_are_nested(mode: Any, kind: str) -> None:
    search = search_of(mode=mode, more=POOLED[kind]) if kind in POOLED else search_of(kind, mode=mode)
    dropped = set()
    for tolerance in (1e-4, 1e-3, 1e-2, 1e-1):
        found = search.by_tolerance(tolerance)
        assert found.tolerance == tolerance
        assert all(error <= tolerance for error in found.errors)
        for block, (kept, after) in enumerate(itertools.pairwise(found.kept)):
            assert set(after) <= set(kept)
            assert set(range(search.prefix)) <= set(kept)
            assert found.errors[block] == search.error(block, kept, after)
        if kind not in POOLED:
            assert found.kept[-1] == search.head.tokens
        dropped.add(sum(map(len, found.kept)))
    assert len(dropped) > 2


@pytest.mark.parametrize("more", POOLED.values(), ids=POOLED)
def test_the_last_block_of_a_pooling_head_keeps_the_smallest_set_within_tolerance(more: dict[str, Any]) -> None:
    """Tokens by the squared weight that the pool gives them times Eq. 6's second factor, and as few as the pool can do with."""
    search = search_of(more=more, step=1)
    reads = search.head.tokens
    assert reads == list(range(search.prefix, search.tokens))
    output = search.features.features[-1][:, reads]
    weights = search.head.weights(output)[..., 0].square()
    scores = (weights * search.features.magnitudes[-1][:, reads]).double().sum(0)
    ranking = [reads[place] for place in scores.argsort(descending=True)]
    errors = [search.error(search.depth - 1, sorted(ranking[: 1 + size]), reads) for size in range(len(reads))]
    sizes = set()
    for tolerance in (1e-4, 0.01, 0.05, 0.1, 0.2):
        found = search.by_tolerance(tolerance)
        kept = found.kept[-1]
        assert kept == sorted(ranking[: len(kept)])
        assert found.errors[-1] == errors[len(kept) - 1] <= tolerance
        assert len(kept) == 1 or errors[len(kept) - 2] > tolerance
        fits = [error <= tolerance for error in errors]
        if fits == sorted(fits):  # E crosses the tolerance once, as the bisection takes for granted
            sizes.add(len(kept))
            assert kept == linear_scan(search, search.depth - 1, ranking[:1], reads, ranking, tolerance)
    assert len(sizes) > 2


@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_the_error_is_the_definition_written_out(mode: Any) -> None:
    model = build(patch_size=8)
    images = images_for(model, IMAGES)
    search = TopDownSearch(features_of(model, images, mode=mode), PaperScore())
    kept, above = [0, 3, 5, 9, 20], [0, 5, 9]
    tokens = model._pos_embed(model.patch_embed(images))
    first = model.blocks[0](tokens)
    dense = model.blocks[1](first)
    if mode == "stale":
        read = tokens.clone()
        read[:, kept] = first[:, kept]
        slim = model.blocks[1](read)[:, above]
    else:
        slim = model.blocks[1](first[:, kept])[:, [0, 2, 3]]
    each = [(slim[i] - dense[i, above]).norm() ** 2 / dense[i, above].norm() ** 2 for i in range(IMAGES)]
    assert search.error(0, kept, above) == pytest.approx(float(sum(each) / IMAGES), rel=1e-4)


@pytest.mark.parametrize("more", [POOLED["avg"], POOLED["map"]], ids=["avg", "map"])
def test_the_error_above_the_last_block_is_the_pooled_features(more: dict[str, Any]) -> None:
    model = build(patch_size=8, **more)
    images = images_for(model, IMAGES)
    search = TopDownSearch(features_of(model, images), PaperScore())
    prefix, kept = search.prefix, [search.prefix + token for token in (0, 3, 17)]
    normed = model.forward_features(images)
    slim, dense = (
        given.mean(1) if model.attn_pool is None else model.attn_pool(given) for given in (normed[:, kept], normed[:, prefix:])
    )
    each = (slim - dense).square().sum(1) / dense.square().sum(1)
    assert search.error(3, kept, list(range(prefix, search.tokens))) == pytest.approx(float(each.mean()), rel=1e-4)


def test_errors_are_of_a_spread_sample_of_many_images() -> None:
    model = build()
    images = images_for(model, 77)
    features = features_of(model, images)
    assert features.count(features.sample) <= ERROR_IMAGES
    chosen = torch.cat([torch.arange(*features.places[batch].indices(77)[:2]) for batch in features.sample])
    assert 40 <= len(chosen) <= ERROR_IMAGES
    assert chosen.max() > 60 > 20 > chosen.min()
    alone = features_of(model, images[chosen])
    assert features.error(1, [0, 2, 5], [0, 2]) == pytest.approx(alone.error(1, [0, 2, 5], [0, 2]), rel=1e-6)


@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_tolerance_0_cuts_the_exact_last_block_only(mode: Any) -> None:
    search = search_of(mode=mode)
    found = search.by_tolerance(0)
    assert found.kept == [list(range(37))] * 3 + [[0]]
    assert found.errors == [0.0] * 4


@pytest.mark.parametrize("more", POOLED.values(), ids=POOLED)
def test_tolerance_0_cuts_what_a_pooling_head_does_not_read(more: dict[str, Any]) -> None:
    search = search_of(more=more)
    everything = list(range(search.tokens))
    found = search.by_tolerance(0)
    assert found.kept == [everything] * 3 + [everything[search.prefix :]]
    assert found.errors == [0.0] * 4
    assert within(search, 0.0).kept == found.kept


@pytest.mark.parametrize("kind", ["class_token", "registers", *POOLED])
@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_counts_are_met_exactly_where_nesting_allows(mode: Any, kind: str) -> None:
    search = search_of(mode=mode, more=POOLED[kind]) if kind in POOLED else search_of(kind, mode=mode)
    for counts in ([30, 20, 11, 6], [37, 30, 30, 9], [12, 11, 10, 2]):
        wanted = [*counts[:-1], search.fixed_head or counts[-1]]
        found = search.by_counts([min(count, search.tokens) for count in counts], tolerance=0.5)
        assert counts_of(found) == [min(count, search.tokens) for count in wanted]
        assert found.tolerance == 0.5
        for block, (kept, after) in enumerate(itertools.pairwise(found.kept)):
            assert {*after, *range(search.prefix)} <= set(kept)
            assert found.errors[block] == search.error(block, kept, after)


def test_counts_that_cannot_nest_become_the_fewest_that_can() -> None:
    search = search_of("registers")
    assert counts_of(search.by_counts([3, 20, 1, 9])) == [20, 20, 5, 1]  # five prefix tokens, and one that the head reads
    pooled = search_of(more=POOLED["map, registers"])
    assert counts_of(pooled.by_counts([3, 3, 3, 9])) == [12, 12, 12, 9]


def test_features_that_overflow_are_refused() -> None:
    model = build(patch_size=8)
    model.blocks[2].mlp.fc2.weight.fill_(1e30)
    model.blocks[3].mlp.fc2.weight.fill_(1e30)
    with pytest.raises(InputRejected, match="not finite"):
        features_of(model, images_for(model, 2) * 1e10)
