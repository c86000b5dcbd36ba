"""The top-down search: its bisection against a linear scan, its errors written out, its budget, its memory and its work."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from patchslim.choices import Layout
from patchslim.errors import BudgetUnreachable, InputRejected
from patchslim.macs import macs_of
from slimming.api import make_plan
from slimming.models.blocks import BlockReader
from slimming.models.fused_attention import unfused_attention
from slimming.models.reader import ModelReader
from slimming.models.slim_vit import SlimViT
from slimming.search.costs import MacsCost
from slimming.search.features import ERROR_IMAGES, DenseFeatures, FeatureSettings
from slimming.search.scores import PaperScore, score_named
from slimming.search.top_down import Selection, TopDownSearch
from tests.helpers.timm_models import build, images_for

pytestmark = pytest.mark.numeric

IMAGES = 20
#: Models whose head pools, with and without prefix tokens.
POOLED: dict[str, dict[str, Any]] = {
    "avg": {"global_pool": "avg"},
    "avg, no class token": {"global_pool": "avg", "class_token": False},
    "map": {"global_pool": "map", "class_token": False},
    "map, registers": {"global_pool": "map", "reg_tokens": 2},
}


def features_of(model: Any, images: Tensor, bound: int = 1 << 30, **options: Any) -> DenseFeatures:
    return DenseFeatures(ModelReader(model), iter(images.split(8)), len(images), FeatureSettings(bound=bound, **options))


def search_of(kind: str = "class_token", step: int = 3, images: int = IMAGES, **options: Any) -> TopDownSearch:
    model = build(kind, patch_size=8, **options.pop("more", {}))  # 36 patches
    return TopDownSearch(features_of(model, images_for(model, images), **options), PaperScore(), step=step)


def cost_of(search: TopDownSearch, layout: Layout = "split") -> MacsCost:
    return MacsCost(search.tokens, search.depth, search.reader.geometry(), search.features.mode, layout)


def within(search: TopDownSearch, removed: float, layout: Layout = "split") -> Selection:
    cost = cost_of(search, layout)
    return search.by_budget(cost, (1 - removed) * cost.dense())


def counts_of(found: Selection) -> list[int]:
    return [len(kept) for kept in found.kept]


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


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("kind", ["class_token", "map, registers"])
@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("asked", [0.25, 0.55])
def test_a_budget_is_met_and_hardly_exceeded(mode: Any, layout: Any, kind: str, asked: float) -> None:
    """Less than one token more of any one block is left over: a per cent or two in so small a model."""
    search = search_of(mode=mode, more=POOLED.get(kind, {}))
    found = within(search, asked, layout)
    geometry, tokens = search.reader.geometry(), search.tokens
    removed = 1 - macs_of(counts_of(found), tokens, geometry, mode, layout) / macs_of([tokens] * 4, tokens, geometry)
    assert asked <= removed <= asked + 0.02
    make_plan(search.reader.model, "tiny", found.kept, mode=mode)  # raises where a rule of plans is broken


def test_a_budget_beyond_the_prefix_tokens_is_unreachable() -> None:
    search = search_of()
    geometry = search.reader.geometry()
    most = 1 - macs_of([1] * 4, 37, geometry) / macs_of([37] * 4, 37, geometry)
    with pytest.raises(BudgetUnreachable, match=f"{most:.1%}") as raised:
        within(search, most + 0.01)
    assert raised.value.exit_code == 6
    assert counts_of(within(search, most - 1e-9)) == [1] * 4


def test_no_budget_costs_the_last_block_only() -> None:
    assert counts_of(within(search_of(), 0.0)) == [37, 37, 37, 1]


def test_two_searches_are_identical() -> None:
    assert within(search_of(), 0.4) == within(search_of(), 0.4)


def divergence_written_out(search: TopDownSearch, images: Tensor, counts: list[int]) -> float:
    """KL of the slimmed model's answers to the dense one's, for the tokens that a walk on exactly these images keeps."""
    model, mode = search.reader.model, search.features.mode
    kept = TopDownSearch(features_of(model, images, mode=mode), PaperScore()).by_counts(counts).kept
    slim = SlimViT(model, make_plan(model, "tiny", kept, mode=mode))(images).double().log_softmax(-1)
    return float(functional.kl_div(slim, model(images).double().log_softmax(-1), log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("kind", ["class_token", "distilled", "avg", "map, registers"])
@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_the_divergence_is_that_of_the_slimmed_answers(mode: Any, kind: str) -> None:
    search = search_of(mode=mode, more=POOLED[kind]) if kind in POOLED else search_of(kind, mode=mode)
    images = images_for(search.reader.model, IMAGES)
    found = []
    for last, counts in enumerate(([30, 20, 10], [20, 9, 6], [9, 8, 7])):
        profile = [*counts, search.fixed_head or 6 - last]
        found.append(search.divergence(profile))
        assert found[-1] == pytest.approx(divergence_written_out(search, images, profile), rel=1e-3, abs=1e-7)
    assert min(found) > 1e-5
    assert len(set(found)) == 3


def test_the_divergence_looks_at_the_sample_alone() -> None:
    model = build()
    images = images_for(model, 77)
    features = features_of(model, images)
    search = TopDownSearch(features, PaperScore())
    chosen = torch.cat([images[features.places[batch]] for batch in features.sample])
    assert search.divergence([7, 5, 3, 1]) == pytest.approx(divergence_written_out(search, chosen, [7, 5, 3, 1]), rel=1e-3)


def spills() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("patchslim-*.f32"))


@pytest.mark.parametrize("bound", [1, 40_000])
def test_spilling_changes_nothing_and_leaves_nothing(bound: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted = within(search_of(), 0.4)
    search = search_of(bound=bound)
    assert within(search, 0.4) == wanted
    assert search.features.store.spilled > 0
    assert search.features.store.held <= bound
    assert not spills()
    search.features.close()
    assert not any(tmp_path.iterdir())


def test_the_state_held_is_the_features_and_one_walks_grams() -> None:
    search = search_of()
    store = search.features.store
    features = store.held
    assert features == 4 * (5 * IMAGES * 37 * 48 + 4 * IMAGES * 37)
    for _ in range(3):
        search.by_tolerance(1e-3)
        assert store.held == features
    search.features.close()
    assert store.held == 0


def test_features_that_overflow_are_refused() -> None:
    model = build(patch_size=8)
    model.blocks[2].mlp.fc2.weight.fill_(1e30)
    model.blocks[3].mlp.fc2.weight.fill_(1e30)
    with pytest.raises(InputRejected, match="not finite"):
        features_of(model, images_for(model, 2) * 1e10)


def test_features_that_are_all_zero_end() -> None:
    model = build(patch_size=8)
    for parameter in model.parameters():
        parameter.zero_()
    search = TopDownSearch(features_of(model, images_for(model, 2)), PaperScore())
    cost = cost_of(search)
    assert cost.of(counts_of(within(search, 0.5))) <= 0.5 * cost.dense()


class _Counted:
    """Counts, per call of a block's reader, the images that it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = 0
        for name in ("run", "maps", "value_norms"):
            self._wrap(monkeypatch, name, getattr(BlockReader, name))

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, name: str, real: Any) -> None:
        def counting(reader: BlockReader, view: Any) -> Tensor:
            self.images += len(view.queried)
            result: Tensor = real(reader, view)
            return result

        monkeypatch.setattr(BlockReader, name, counting)


@pytest.mark.parametrize("score", ["paper", "residual", "attention", "random"])
def test_work_grows_linearly_with_the_images(score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the sample that errors look at, an image costs one dense pass and, a block above each cut, a few looks at it."""
    model = build(patch_size=8)
    counted = _Counted(monkeypatch)
    found = []
    for count in (ERROR_IMAGES, 2 * ERROR_IMAGES, 4 * ERROR_IMAGES):
        before = counted.images
        features = features_of(model, images_for(model, count))
        TopDownSearch(features, score_named(score, 0)).by_counts([30, 20, 10, 1])
        found.append(counted.images - before)
    each = (found[1] - found[0]) / ERROR_IMAGES
    assert found[2] - found[1] == 2 * (found[1] - found[0])
    assert 4 <= each <= 4 + 3 * 4  # four blocks, and three cuts with two looks of at most two kinds


@pytest.mark.parametrize(
    ("mode", "depth"),
    [("compact", 6), *(pytest.param(mode, 12, marks=pytest.mark.slow) for mode in ("compact", "stale"))],
)
def test_a_budget_search_costs_few_dense_passes(mode: Any, depth: int) -> None:
    """In MACs: what grows with the images is below two dense passes, and one trial of a profile below 1.3 of the sample's.

    With the default 256 calibration images that makes less than three passes in all for up to five trials.
    """
    model = build(depth=depth, img_size=64, patch_size=8, embed_dim=96)  # 65 tokens
    images = images_for(model, 72)
    trials = []
    with unfused_attention(model), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(images[:8])
        dense = counter.get_total_flops() / 8
        search = TopDownSearch(features_of(model, images, mode=mode), PaperScore())
        counts = [65, 60, 55, 50, 44, 38, 32, 26, 20, 14, 8, 1][12 // depth - 1 :: 12 // depth]
        before = counter.get_total_flops()
        search.divergence(counts)
        trial = (counter.get_total_flops() - before) / (dense * ERROR_IMAGES)
        real = search.divergence
        search.divergence = lambda counts: trials.append(counts) or real(counts)  # type: ignore[method-assign, func-returns-value]
        before = counter.get_total_flops()
        within(search, 0.45)
        whole = (counter.get_total_flops() - before) / dense
        features = before / dense - trial * ERROR_IMAGES - 8
    growing = (features + whole - len(trials) * trial * ERROR_IMAGES) / len(images)
    assert 2 <= len(trials) <= 6
    assert trial < 1.3
    assert 1 < growing < 2
    assert growing + 5 * trial * ERROR_IMAGES / 256 < 3
