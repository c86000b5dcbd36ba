"""Merged tokens: timm's own blocks as the reference, costs, Ward's groups, the refit, summaries, refusals."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import create_transform
from timm.models.eva import Eva
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from patchslim.errors import UsageError
from patchslim.plan import SlimPlan, load_plan
from slimming.api import FinderSettings, PlanFinder, find_plan, make_plan
from slimming.data.source import calibration_set
from slimming.fitting.closed_form import compensate
from slimming.models.attention import AttentionInput
from slimming.models.fused_attention import unfused_attention
from slimming.models.reader import ModelReader, reader_of
from slimming.models.slim_vit import SlimViT
from slimming.models.token_cut import averages_of
from slimming.options import ModelOptions
from slimming.search.budget import Budget
from slimming.search.costs import MacsCost
from slimming.search.features import ERROR_IMAGES, DenseFeatures, FeatureSettings
from slimming.search.profile import profile_within
from slimming.search.request import PlanRequest
from slimming.search.similarity import MergeSearch
from tests.helpers.timm_models import ALL_KINDS, build, images_for, pools, without_fused_attention

pytestmark = pytest.mark.numeric

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SINGLE = [kind for kind in ALL_KINDS if not pools(build(kind))]


def random_merges(model: Any, seed: int) -> SlimPlan:
    """Nested masks that drop patches in every block; nine in ten go into a random kept patch, the others are lost."""
    reader, draw = ModelReader(model), random.Random(seed)
    prefix, patches = list(range(reader.prefix)), list(range(reader.prefix, reader.tokens))
    merged_into, kept = [-1] * reader.tokens, []
    for _ in reader.blocks[:-1]:
        left = sorted(draw.sample(patches, max(1, len(patches) - draw.randint(0, 3))))
        for token in set(patches) - set(left):
            merged_into[token] = draw.choice(left) if draw.random() < 0.9 else -1
        kept.append(prefix + left)
        patches = left
    return make_plan(model, "tiny", [*kept, reader.head.tokens], merged_into=merged_into)


def first_norms(block: Any) -> list[Any]:
    """The norms that a block applies to its input."""
    if hasattr(block, "in_norm"):
        return [block.in_norm]
    return [part.norm for part in block.attns] if hasattr(block, "attns") else [block.norm1]


@torch.no_grad()
def written_out(model: Any, images: Tensor, plan: SlimPlan) -> Tensor:
    """Logits under ``plan`` by timm's own blocks: behind the tokens that are there stand those to be computed, unseen as keys.

    A token that stands for c others is c times as likely to be looked at. Means are taken of what comes out of the first norm.
    """
    rope, tokens = None, model._pos_embed(model.patch_embed(images))
    if isinstance(model, Eva):
        tokens, rope = tokens
    tokens = model.norm_pre(tokens)
    present, size = list(range(plan.tokens)), dict.fromkeys(range(plan.tokens), 1)
    for index, (block, kept) in enumerate(zip(model.blocks, plan.kept, strict=True)):
        groups = {token: [token] for token in kept}
        for token in set(present) - set(kept):
            if plan.merged_into is not None and plan.merged_into[token] >= 0:
                groups[plan.merged_into[token]].append(token)

        shares = torch.zeros(len(kept), len(present))
        for row, group in enumerate(groups.values()):
            for token in group:
                shares[row, present.index(token)] = size[token] / sum(size[each] for each in group)

        def hook(_module: Any, _inputs: Any, output: Tensor, shares: Tensor = shares) -> Tensor:
            rows = output[:, : shares.shape[1]]
            return torch.cat([rows, shares @ rows], dim=1)

        count = len(present)
        mask = torch.zeros(count + len(kept), count + len(kept))
        mask[:, :count] = torch.tensor([float(size[token]) for token in present]).log()
        mask[:, count:] = float("-inf")
        rotation = {}
        if isinstance(model, Eva):
            table = rope[index] if model.rope_mixed and rope is not None else rope
            places = [token - plan.prefix_tokens for token in present[plan.prefix_tokens :]]
            if table is not None:
                still = torch.cat([torch.zeros(table.shape[-1] // 2), torch.ones(table.shape[-1] // 2)])
                queried = [table[..., [token - plan.prefix_tokens], :] if token >= plan.prefix_tokens
                           else still.expand(*table.shape[:-2], 1, -1) for token in kept]  # fmt: skip
                table = torch.cat([table[..., places, :], *queried], dim=-2)
            rotation = {"rope": table}
        post_norm = "Post" in type(block).__name__
        hooks = [] if post_norm else [norm.register_forward_hook(hook) for norm in first_norms(block)]
        output = block(torch.cat([tokens, shares @ tokens], dim=1), attn_mask=mask, **rotation)
        for handle in hooks:
            handle.remove()
        tokens, size = output[:, count:], {token: sum(size[each] for each in group) for token, group in groups.items()}
        present = kept
    return ModelReader(model).head.logits(tokens)


@pytest.mark.parametrize("fused", [True, False])
def test_a_key_with_log_c_weighs_as_much_as_c_copies(fused: bool) -> None:
    """Softmax and mix with log(7) on one key, against that token seven times among the keys."""
    torch.manual_seed(0)
    model = build()
    attention = ModelReader(model).blocks[0].attentions[0][1]
    attention.module.fused_attn = fused
    tokens, queried = torch.randn(2, 5, 48), torch.randn(2, 3, 48)
    copies = torch.cat([tokens, *[tokens[:, -1:]] * 6], dim=1)
    bias = torch.tensor([1.0, 1.0, 1.0, 1.0, 7.0]).log()
    once = attention.inner(AttentionInput(tokens, queried, key_bias=bias))
    torch.testing.assert_close(once, attention.inner(AttentionInput(copies, queried)))
    assert not torch.allclose(once, attention.inner(AttentionInput(tokens, queried)), atol=1e-3)


@pytest.mark.parametrize("kind", SINGLE)
def test_a_merging_plan_is_the_written_out_loop(kind: str) -> None:
    model = build(kind)
    images = images_for(model, 2)
    for seed in range(4):
        plan = random_merges(model, seed)
        answer = SlimViT(model, plan)(images)
        torch.testing.assert_close(answer, written_out(model, images, plan), **CLOSE)
        lost = make_plan(model, "tiny", plan.kept)
        assert plan.sizes() == lost.sizes() or not torch.allclose(answer, SlimViT(model, lost)(images), atol=1e-4)


@pytest.mark.parametrize("kind", ["class_token", "registers", "parallel_things"])
def test_macs_are_the_profilers(kind: str) -> None:
    model = build(kind)
    reader = ModelReader(model)
    prefix = list(range(reader.prefix))
    kept = [prefix + list(range(reader.prefix, reader.tokens))[:count] for count in (6, 6, 3)]
    merged_into = [-1] * reader.tokens
    for token in range(reader.prefix + 3, reader.tokens):
        merged_into[token] = reader.prefix
    plan = make_plan(model, "tiny", [*kept, reader.head.tokens], merged_into=merged_into)
    slim = without_fused_attention(SlimViT(model, plan))
    with FlopCounterMode(display=False) as counter:
        slim(images_for(model, 1))
    if kind != "parallel_things":  # its two attentions mix their norms' outputs one by one, a graph would as well
        assert 2 * plan.macs() == counter.get_total_flops()
    assert plan.macs("packed") > plan.macs() > make_plan(model, "tiny", plan.kept).macs()


def test_sizes_and_means_of_a_plan_by_hand() -> None:
    """Ten tokens: 3 and 4 go into 2, then 2 (three of them) into 1, and 5 is lost."""
    merged_into = [-1] * 10
    merged_into[3] = merged_into[4] = 2
    merged_into[2] = 1
    kept = [[0, 1, 2, 5, 6, 7, 8, 9], [0, 1, 6, 7, 8, 9], [0, 1, 6], [0]]
    plan = make_plan(build(), "tiny", kept, merged_into=merged_into)
    assert plan.sizes() == [[1, 1, 3, 1, 1, 1, 1, 1], [1, 4, 1, 1, 1, 1], [1, 4, 1], [1]]
    means = averages_of(plan.kept, 10, merged_into)
    assert means[1][1].tolist() == [0, 0.25, 0.25, 0.25, 0.25, 0, 0, 0, 0, 0]
    assert means[2].sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "stale"}, "mode compact"),
        ({"merged_into": [-1] * 9}, "9 entries for 10 tokens"),
        ({"merged_into": [-1, -1, -1, 4, -1, -1, -1, -1, -1, -1]}, "does not keep patch 4"),
        ({"merged_into": [-1, -1, -1, 0, -1, -1, -1, -1, -1, -1]}, "does not keep patch 0"),
        ({"merged_into": [-1, 2, -1, -1, -1, -1, -1, -1, -1, -1]}, "last block drops for good"),
        ({"merged_into": [1, -1, -1, -1, -1, -1, -1, -1, -1, -1]}, "never dropped"),
    ],
)
def test_merges_that_no_plan_has_are_refused(change: dict[str, Any], message: str) -> None:
    kept = [[0, 1, 2, 5], [0, 1, 2], [0, 1], [0]]
    with pytest.raises(ValueError, match=message):
        make_plan(build(), "tiny", kept, **{"merged_into": [-1] * 10, **change})


def test_a_pooled_head_takes_no_merged_tokens() -> None:
    model = build("avg_with_class")
    with pytest.raises(ValueError, match="a head that reads single tokens"):
        make_plan(model, "tiny", [list(range(10))] * 4, merged_into=[-1] * 10)
    images, transform = calibration_set("digits", 8), create_transform((3, 48, 48))
    with pytest.raises(UsageError, match="this model's pools"):
        find_plan(model, images, PlanRequest(score="similarity"), name="tiny", transform=transform)
    with pytest.raises(UsageError, match="this model's pools"):
        find_plan(model, images, PlanRequest(summary=True), name="tiny", transform=transform)
    assert find_plan(model, images, name="tiny", transform=transform).plan.origin.score == "paper"


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = random_merges(build(), 3)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def features_of(model: Any, count: int = 24, seed: int = 0) -> DenseFeatures:
    images = images_for(model, count, seed=seed)
    return DenseFeatures(ModelReader(model), iter(images.split(8)), count, FeatureSettings(magnitudes=False))


def test_groups_are_wards_by_brute_force() -> None:
    """At every step all pairs are tried, and the sum of squares within groups is computed from the features themselves."""
    model = build(patch_size=12)  # sixteen patches
    features = features_of(model)
    search = MergeSearch(features)
    counts = [13, 9, 5, 1]
    kept, merged_into = search.groups(counts)
    groups = [{token} for token in range(1, features.tokens)]

    def spread(group: set[int], tokens: Tensor) -> float:
        part = tokens[:, sorted(group)].double()
        return float((part - part.mean(1, keepdim=True)).square().sum())

    for block, count in enumerate(counts[:-1]):
        tokens = features.output(block - 1, slice(0, 24))
        while len(groups) > count - 1:

            def cost(pair: tuple[set[int], set[int]], tokens: Tensor = tokens) -> float:
                return spread(pair[0] | pair[1], tokens) - spread(pair[0], tokens) - spread(pair[1], tokens)

            first, second = min(itertools.combinations(groups, 2), key=cost)
            groups = [group for group in groups if group not in (first, second)] + [first | second]
        matrix = averages_of(kept, features.tokens, merged_into)[block]
        found = [set(np.flatnonzero(row).tolist()) for row in matrix.numpy()[1:]]
        assert sorted(map(sorted, found)) == sorted(map(sorted, groups))
    assert [len(block) for block in kept] == counts


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize(
    "more", [{"score": "similarity"}, {"score": "attention", "summary": True}], ids=["similarity", "summary"]
)
def test_find_meets_the_budget_with_the_merging_counted(layout: Any, more: dict[str, Any]) -> None:
    model = build(patch_size=8)
    found = find_plan(
        model,
        calibration_set("digits", 24),
        PlanRequest(Budget("macs-reduction", 0.4), fit="closed-form", layout=layout, **more),
        name="tiny",
        transform=create_transform((3, 48, 48)),
    )
    plan = found.plan
    assert plan.merged_into is not None
    assert plan.origin.score == more["score"]
    assert 0.37 * plan.dense_macs() < plan.dense_macs() - plan.macs(layout)
    assert plan.macs(layout) <= 0.6 * plan.dense_macs()
    cost = MacsCost(plan.tokens, plan.depth, plan.geometry, layout=layout, merged=True)
    assert cost.of(plan.counts) == plan.macs(layout)
    assert SlimViT(found.model, plan)(images_for(model, 2)).isfinite().all()
    assert all(error >= 0 for error in plan.origin.errors)
    assert max(plan.origin.errors) > 0
    if "summary" in more:
        assert len({into for into in plan.merged_into if into >= 0}) == 1


def test_auto_is_similarity_and_its_plan_is_the_same_again() -> None:
    model = build(patch_size=8)
    settings, transform = FinderSettings(magnitudes=False), create_transform((3, 48, 48))
    finder = PlanFinder(reader_of(model), calibration_set("digits", 24), name="tiny", transform=transform, settings=settings)
    requests = [PlanRequest(Budget("macs-reduction", 0.4), score) for score in ("auto", "similarity")]  # type: ignore[arg-type]
    first, second = (finder.find_plan(request).plan for request in requests)
    assert first == second
    assert first.origin.score == "similarity"


def test_the_refit_brings_the_means_closer() -> None:
    """The answers, and what every block computes, on other images than it was fitted on."""
    model = build()
    plan, other = random_merges(model, 1), images_for(model, 48, seed=9)
    fitted = copy.deepcopy(model)
    compensate(fitted, features_of(model, 160), plan)
    errors = [(SlimViT(each, plan)(other) - model(other)).square().sum() for each in (model, fitted)]
    assert errors[1] < 0.9 * errors[0]


def test_the_refit_of_exact_merges_changes_nothing() -> None:
    """Where the merged patches are copies of each other, as pixels and positions, a mean loses nothing."""
    model = build()
    with torch.no_grad():
        model.pos_embed[:, 2:5] = model.pos_embed[:, 2:3]
    images = images_for(model, 40)
    images[:, :, :16, 32:] = images[:, :, :16, 16:32]  # a 3 x 3 grid of patches of 16 pixels: patches 1, 2 and 3
    images[:, :, 16:32, :16] = images[:, :, :16, 16:32]
    merged_into = [-1, -1, -1, 2, 2, -1, -1, -1, -1, -1]
    kept = [[0, 1, 2, 5, 6, 7, 8, 9]] * 3 + [[0]]
    plan = make_plan(model, "tiny", kept, merged_into=merged_into)
    torch.testing.assert_close(SlimViT(model, plan)(images), model(images), **CLOSE)
    fitted = copy.deepcopy(model)
    compensate(fitted, DenseFeatures(ModelReader(model), iter(images.split(8)), 40, FeatureSettings(magnitudes=False)), plan)
    for name, weight in fitted.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "option", [{"summary": True, "score": "paper"}, {"score": "similarity"}], ids=["summary", "similarity"]
)
@pytest.mark.parametrize(
    ("more", "message"),
    [({"mode": "stale"}, "stale"), ({"fit": "sgd"}, "sgd")],
)
def test_what_does_not_go_with_merging_is_refused_before_the_search(
    option: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ModelOptions(**option, **more).check()
    ModelOptions(**more).check()
    ModelOptions(**option).check()


@pytest.mark.parametrize(
    ("more", "message"), [({"summary": True}, "nothing left for --summary"), ({"tolerance": 0.01}, "pass --score paper")]
)
def test_similarity_has_its_own_refusals(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelOptions(score="similarity", **more).check()
    ModelOptions(**more).check()


def test_the_slim_module_can_be_trained_copied_and_run_in_half_precision() -> None:
    model = build("registers")
    slim = copy.deepcopy(SlimViT(model, random_merges(model, 1))).requires_grad_(True)
    images = images_for(model, 2)
    slim(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())
    answer = slim(images).detach()
    half = slim.to(torch.bfloat16)(images.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), answer, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    ("images", "depth"), [(64, 6), *(pytest.param(count, 12, marks=pytest.mark.slow) for count in (64, 128))]
)
def test_a_search_costs_less_than_three_dense_passes(images: int, depth: int) -> None:
    """In MACs, everything counted: dense features, distances, every trial of a profile on half of the images, and errors."""
    model = build(depth=depth, img_size=64, patch_size=8, embed_dim=96)  # 65 tokens
    with unfused_attention(model), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(images_for(model, 8))
        dense = counter.get_total_flops() / 8
        before = counter.get_total_flops()
        features = DenseFeatures(
            ModelReader(model), iter(images_for(model, images).split(8)), images, FeatureSettings(magnitudes=False)
        )
        search = MergeSearch(features)
        cost = MacsCost(search.tokens, search.depth, search.reader.geometry(), merged=True)
        counts = profile_within(search, cost, 0.55 * cost.dense())
        search.by_counts(counts)
        passes = (counter.get_total_flops() - before) / dense / images
    assert cost.of(counts) <= 0.55 * cost.dense()
    assert 1.5 < passes < (3 if images >= 2 * ERROR_IMAGES else 4)


def test_counts_of_a_pooled_head_that_would_lose_prefix_tokens_are_refused() -> None:
    """One prefix token and nine patches: the last block's four need five in the block before."""
    model = build("avg_with_class")
    images, transform = calibration_set("digits", 8), create_transform((3, 48, 48))
    with pytest.raises(UsageError, match="4 in the last block need at least 5 in the one before"):
        find_plan(model, images, name="tiny", transform=transform, request=PlanRequest(Budget("tokens", tokens=(4, 4, 4, 4))))
    found = find_plan(
        model, images, name="tiny", transform=transform, request=PlanRequest(Budget("tokens", tokens=(5, 5, 5, 4)))
    )
    assert found.plan.counts == [5, 5, 5, 4]
