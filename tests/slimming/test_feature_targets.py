"""Features as targets: what a slimmed model's tokens should be, against an oracle, for every kind of plan and head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from patchslim.errors import UsageError
from slimming.api import dense_plan, make_plan
from slimming.fitting.feature_targets import DenseTargets, SlimStreams, feature_loss
from slimming.fitting.recipe import Recipe
from slimming.models.slim_vit import SlimViT
from tests.helpers.finetuning import models, run, state
from tests.helpers.timm_models import build, random_plan

IMAGES = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def dense_features(model: Any, images: Tensor) -> list[Tensor]:
    """What timm's blocks give, by hooks."""
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, given, out: found.append(out)) for block in model.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("class_token", "compact"), ("class_token", "stale"), ("avg_with_class", "compact"), ("map_with_class", "compact")],
)
@torch.no_grad()
def test_targets_are_the_dense_features_of_the_kept_tokens(kind: str, mode: Any) -> None:
    model = build(kind)
    plan = random_plan(model, 3, mode)
    logits, wanted = DenseTargets(model, plan)(IMAGES)
    assert torch.allclose(logits, model(IMAGES), atol=1e-5)
    dense = dense_features(model, IMAGES)
    first = next(block for block, count in enumerate(plan.counts) if count < plan.tokens)
    assert len(wanted) == plan.depth - first
    for block, target in enumerate(wanted, start=first):
        assert torch.allclose(target, dense[block][:, plan.kept[block]], atol=1e-5)
    slim = SlimViT(model, plan)
    logits, found = SlimStreams(slim)(IMAGES)
    assert torch.equal(logits, slim(IMAGES))
    assert [tokens.shape for tokens in found] == [target.shape for target in wanted]


@torch.no_grad()
def test_a_merged_tokens_target_is_the_mean_of_all_that_it_stands_for() -> None:
    model = build("class_token")
    tokens, depth = dense_plan(model, "vit").tokens, len(model.blocks)
    everything = list(range(tokens))
    kept = [[token for token in everything if token != 3], *[[t for t in everything if t not in (3, 4)]] * (depth - 2), [0]]
    merged_into = [-1] * tokens
    merged_into[3], merged_into[4] = 4, 5
    plan = make_plan(model, "vit", kept, merged_into=merged_into)
    _, wanted = DenseTargets(model, plan)(IMAGES)
    dense = dense_features(model, IMAGES)
    assert torch.allclose(wanted[0][:, kept[0].index(4)], dense[0][:, 3:5].mean(1), atol=1e-5)
    assert torch.allclose(wanted[1][:, kept[1].index(5)], dense[1][:, 3:6].mean(1), atol=1e-5)
    assert torch.allclose(wanted[1][:, kept[1].index(6)], dense[1][:, 6], atol=1e-5)


@torch.no_grad()
def test_the_dense_plan_misses_nothing_and_the_loss_is_a_share_of_each_image() -> None:
    model = build("class_token")
    plan = dense_plan(model, "vit")
    assert float(feature_loss(SlimStreams(SlimViT(model, plan))(IMAGES)[1], DenseTargets(model, plan)(IMAGES)[1])) < 1e-10
    wanted = torch.stack([torch.ones(2, 4), 100 * torch.ones(2, 4)])
    assert float(feature_loss([1.1 * wanted, wanted], [wanted, wanted])) == pytest.approx(0.005)
    parts = [float(feature_loss([wanted[i : i + 1] + 1], [wanted[i : i + 1]])) for i in range(2)]
    assert float(feature_loss([wanted + 1], [wanted])) == pytest.approx(sum(parts) / 2)


def test_training_on_features_alone_brings_them_closer() -> None:
    slim, teacher = models()

    def missed() -> float:
        with torch.no_grad():
            return float(feature_loss(SlimStreams(slim)(IMAGES)[1], DenseTargets(teacher, slim.plan)(IMAGES)[1]))

    before, taught, names = missed(), state(teacher), list(state(slim))
    with torch.no_grad():
        for block in slim.model.blocks:
            block.mlp.fc2.bias += 0.5
    spoilt = missed()
    run(slim, teacher, Recipe(epochs=8, batch_size=8, lr=1e-2, distill=0.0, label_smoothing=0.0, features=100.0))
    assert spoilt > before
    assert missed() < 0.75 * spoilt
    assert list(state(slim)) == names
    assert all(torch.equal(value, taught[name]) for name, value in state(teacher).items())


def test_features_need_an_original_and_a_slim_vit() -> None:
    slim, teacher = models()
    recipe = Recipe(epochs=1, features=1.0)
    for pair in ((slim, None), (copy.deepcopy(teacher), teacher)):
        with pytest.raises(UsageError, match="features are the dense original's, for a SlimViT"):
            run(*pair, recipe)
    with pytest.raises(UsageError, match=r"features -1\.0 is out of range"):
        run(slim, teacher, Recipe(features=-1.0))
