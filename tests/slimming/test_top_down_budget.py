"""The top-down search for a budget: how closely it is met, what is compared on the way, its memory and its work."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from patchslim.errors import BudgetUnreachable
from patchslim.macs import macs_of
from slimming.api import make_plan
from slimming.models.blocks import BlockReader
from slimming.models.fused_attention import unfused_attention
from slimming.models.slim_vit import SlimViT
from slimming.search.features import ERROR_IMAGES
from slimming.search.scores import PaperScore, score_named
from slimming.search.top_down import TopDownSearch
from tests.helpers.searches import IMAGES, POOLED, cost_of, counts_of, features_of, search_of, within
from tests.helpers.timm_models import build, images_for

pytestmark = pytest.mark.numeric


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
