"""The closed-form refit: each stage against least squares on rows gathered one by one, and what it must and must not change."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import create_transform
from timm.layers import SwiGLU
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor

from patchslim.errors import InputRejected
from patchslim.plan import SlimPlan
from slimming.api import dense_plan, find_plan, make_plan
from slimming.data.source import calibration_set
from slimming.fitting import closed_form as module
from slimming.fitting.closed_form import RIDGE, can_compensate, compensate
from slimming.models.attention import AttentionInput
from slimming.models.blocks import Stage
from slimming.models.reader import ModelReader
from slimming.models.slim_vit import SlimViT
from slimming.search.budget import Budget
from slimming.search.features import DenseFeatures, FeatureSettings
from slimming.search.request import PlanRequest
from tests.helpers.timm_models import build, images_for
from tests.helpers.tolerances import solve_error, sum_error

pytestmark = pytest.mark.numeric

IMAGES = 44
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("class_token", {}),
    "layer scale": ("layer_scale", {}),
    "distilled": ("distilled", {}),
    "avg": ("class_token", {"global_pool": "avg"}),
    "no bias": ("class_token", {"proj_bias": False}),
    "swiglu": ("class_token", {"mlp_layer": SwiGLU}),
    "parallel": ("layer_scale", {"block_fn": ParallelThingsBlock}),
    "parallel scaling": ("layer_scale", {"block_fn": ParallelScalingBlock}),
}


def model_of(kind: str) -> Any:
    name, more = KINDS[kind]
    return build(name, depth=3, **more)


def plan_of(model: Any, mode: Any = "compact") -> SlimPlan:
    """Nine patches less some in block 0, some more in block 1, and what the head reads."""
    reader = ModelReader(model)
    prefix = list(range(reader.prefix))
    patches = [reader.prefix + patch for patch in (0, 1, 3, 4, 6, 8)]
    last = reader.head.tokens if reader.head.fixed else patches[1:4]
    return make_plan(model, "tiny", [prefix + patches, prefix + patches[:4], last], mode=mode)


def features_of(model: Any, images: Tensor, mode: Any = "compact", bound: int = 1 << 30) -> DenseFeatures:
    return DenseFeatures(ModelReader(model), iter(images.split(8)), len(images), FeatureSettings(mode, bound=bound))


def refitted(model: Any, images: Tensor, plan: SlimPlan, bound: int = 1 << 30, **options: Any) -> Any:
    fitted = copy.deepcopy(model)
    compensate(fitted, features_of(model, images, plan.mode, bound), plan, **options)
    return fitted


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: Any, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


def stage_inputs(model: Any, plan: SlimPlan, images: Tensor) -> list[tuple[int, Stage, AttentionInput]]:
    """Every stage of ``model`` under ``plan`` with what it is given, all images at once."""
    reader, everything = ModelReader(model), list(range(plan.tokens))
    tokens, present, found = reader.embed(images), everything, []
    for index, (block, kept) in enumerate(zip(reader.blocks, plan.kept, strict=True)):
        view = reader.view(tokens, everything if plan.mode == "stale" else present, kept, None)
        for stage in block.stages:
            found.append((index, stage, view))
            stream = stage.run(view)
            view = AttentionInput(stream, stream)
        tokens = tokens.index_copy(1, torch.tensor(kept), stream) if plan.mode == "stale" else stream
        present = kept
    return found


def targets(model: Any, plan: SlimPlan, images: Tensor) -> list[Tensor]:
    """The dense model's stream after every stage, at the rows that the block keeps."""
    reader, found = ModelReader(model), []
    tokens = reader.embed(images)
    for block, kept in zip(reader.blocks, plan.kept, strict=True):
        view = AttentionInput(tokens, tokens)
        for stage in block.stages:
            tokens = stage.run(view)
            found.append(tokens[:, kept])
            view = AttentionInput(tokens, tokens)
    return found


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Models, images and features in float64: what is left to compare is the formula, not how a processor adds."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("in_float64")
def test_every_stage_is_the_ridge_regression_on_gathered_rows(kind: str, mode: Any) -> None:
    """``min_D ||X D - R||^2 + lambda ||D||^2`` by least squares on X with a row of sqrt(lambda) appended per input.

    Stages before the one looked at are already refitted, and it still has its old projections.
    """
    model = model_of(kind)
    images, plan = images_for(model, IMAGES), plan_of(model, mode)
    fitted = refitted(model, images, plan)
    wanted = targets(model, plan, images)
    after, count = state(fitted), 0
    old = copy.deepcopy(fitted)  # made whole again stage by stage, from the last one up
    old_reader, original = ModelReader(old), ModelReader(model)
    stages = [(block, number) for block in range(3) for number in range(len(old_reader.blocks[block].stages))]
    for (block, number), target in reversed(list(zip(stages, wanted, strict=True))):
        for branch, source in zip(
            old_reader.blocks[block].stages[number].branches, original.blocks[block].stages[number].branches, strict=True
        ):
            assert branch.projection is not None
            assert source.projection is not None
            branch.projection.load_state_dict(source.projection.state_dict())
        _, stage, view = next(
            entry for place, entry in zip(stages, stage_inputs(old, plan, images), strict=True) if place == (block, number)
        )
        rows, missing = [], []
        inputs = [branch.inner(view) for branch in stage.branches]
        missed = target - stage.run(view)
        for image in range(IMAGES):
            for token in range(len(plan.kept[block])):
                rows.append(np.concatenate([given[image, token].numpy() for given in inputs] + [np.ones(1)]))
                missing.append(missed[image, token].numpy())
        x, r = np.array(rows, np.float64), np.array(missing, np.float64)
        width = x.shape[1] - 1
        ridge = RIDGE * np.square(x[:, :width]).sum(0).mean()
        penalty = np.full(width + 1, ridge)
        penalty[-1] = 1e-6 * ridge
        if kind == "no bias":
            x, penalty = x[:, :-1], penalty[:-1]
        x, r = np.concatenate([x, np.diag(np.sqrt(penalty))]), np.concatenate([r, np.zeros((len(penalty), r.shape[1]))])
        change = np.linalg.lstsq(x, r, rcond=None)[0]
        singular = np.linalg.svd(x, compute_uv=False)
        relative = solve_error((singular[0] / singular[-1]) ** 2, len(x), torch.float64)
        # R is a difference of streams: their rounding remains where nothing is missing.
        noise = sum_error(width, torch.float64) * float(target.abs().max()) * np.sqrt(len(x)) / singular[-1]
        at, free = 0, True
        new_stage = ModelReader(fitted).blocks[block].stages[number]
        for branch, new in zip(stage.branches, new_stage.branches, strict=True):
            assert branch.projection is not None
            assert new.projection is not None
            # The change is read off the sum that is stored, so that the sum's own rounding comes on top.
            stored = np.finfo(np.float64).eps * float(new.projection.weight.abs().max())
            gamma = 1.0 if branch.gamma is None else branch.gamma.numpy()
            part = change[at : at + branch.projection.in_features]
            at += branch.projection.in_features
            moved = (new.projection.weight - branch.projection.weight).numpy().T * gamma  # as the stream sees it
            np.testing.assert_allclose(moved, part, rtol=0, atol=relative * np.abs(part).max() + noise + stored)
            if kind == "no bias":
                assert new.projection.bias is None
            else:  # the constant goes to the first branch alone
                shift = change[-1] if free else np.zeros(change.shape[1])
                free = False
                assert new.projection.bias is not None
                assert branch.projection.bias is not None
                moved = (new.projection.bias - branch.projection.bias).numpy() * gamma
                np.testing.assert_allclose(moved, shift, rtol=0, atol=relative * np.abs(shift).max() + noise + stored)
            count += int(np.abs(part).max() > 1e-4)
    assert count >= 2
    assert changed(fitted, after) == []


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_the_rounding_of_normal_equations_does_not_grow_with_the_means(rows: int) -> None:
    """Products of float32 rows whose means are 1000 times their spread, and a column of ones, as those of float64."""
    rng = torch.Generator().manual_seed(0)
    spread = torch.randn(rows, 40, generator=rng)
    inputs, targets = torch.cat([1000 + spread[:, :30], torch.ones(rows, 1)], dim=1), -500 + spread[:, 30:]
    found = module.normal_equations(inputs, targets)
    wanted = inputs.double().T @ torch.cat([inputs, targets], dim=1).double()
    assert found.dtype == torch.float64
    # As if the rows had no means: sums of ``rows`` products of about 1. With their means in float32 it would be 1e6 times that.
    torch.testing.assert_close(found, wanted, rtol=0, atol=rows * sum_error(rows) + 1e-6)


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_stage_is_further_from_the_dense_model_than_before_its_refit(kind: str, mode: Any) -> None:
    """What is minimised cannot rise at any stage, and in the end E of the last block has fallen."""
    model = model_of(kind)
    images, plan = images_for(model, IMAGES), plan_of(model, mode)
    before = state(model)
    fitted = refitted(model, images, plan)
    assert changed(model, before) == []
    wanted = targets(model, plan, images)
    dense, slim = ModelReader(model), ModelReader(fitted)
    for (index, stage, view), target in zip(stage_inputs(fitted, plan, images), wanted, strict=True):
        number = next(place for place, each in enumerate(slim.blocks[index].stages) if _same(each, stage))
        now = float((stage.run(view) - target).square().sum())
        then = float((dense.blocks[index].stages[number].run(view) - target).square().sum())
        assert now <= then * (1 + 1e-4) + 1e-6
    ends = [float((stage_inputs_end(each, plan, images) - wanted[-1]).square().sum()) for each in (fitted, model)]
    assert ends[0] < ends[1]
    allowed = {id(branch.projection) for block in slim.blocks for stage in block.stages for branch in stage.branches}
    owners = {name for name, part in fitted.named_modules() if id(part) in allowed}
    assert {name.rpartition(".")[0] for name in changed(fitted, before)} <= owners


def _same(one: Stage, other: Stage) -> bool:
    return one.branches[0].projection is other.branches[0].projection


def stage_inputs_end(model: Any, plan: SlimPlan, images: Tensor) -> Tensor:
    """What the last stage under ``plan`` gives."""
    _, stage, view = stage_inputs(model, plan, images)[-1]
    return stage.run(view)


@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_the_slim_answers_come_closer_on_other_images_too(mode: Any) -> None:
    model = build(depth=3)
    plan = plan_of(model, mode)
    fitted = refitted(model, images_for(model, 200), plan)
    other = images_for(model, 60, seed=9)
    before, after = (float((SlimViT(each, plan)(other) - model(other)).square().sum()) for each in (model, fitted))
    assert after < 0.9 * before


def test_without_a_cut_nothing_changes() -> None:
    model = build(depth=3)
    before = state(model)
    assert changed(refitted(model, images_for(model, IMAGES), dense_plan(model, "tiny")), before) == []


def test_blocks_before_the_first_cut_are_left_alone() -> None:
    model = build(depth=3)
    before = state(model)
    plan = make_plan(model, "tiny", [list(range(10)), [0, 1, 4, 5], [0]])
    names = changed(refitted(model, images_for(model, IMAGES), plan), before)
    assert names
    assert not any(name.startswith("blocks.0.") for name in names)


def test_a_dead_layer_scale_leaves_its_projection_alone() -> None:
    model = build("layer_scale", depth=3)
    model.blocks[1].ls1.gamma[:5] = 0
    before = model.blocks[1].attn.proj.weight.clone()
    fitted = refitted(model, images_for(model, IMAGES), plan_of(model))
    weight = fitted.blocks[1].attn.proj.weight
    assert weight.isfinite().all()
    assert torch.equal(weight[:5], before[:5])
    assert not torch.equal(weight[5:], before[5:])


def test_more_ridge_moves_less() -> None:
    model = build(depth=3)
    images, plan = images_for(model, IMAGES), plan_of(model)
    moves = []
    for ridge in (1e-3, RIDGE, 10.0, 1e12):
        fitted = refitted(model, images, plan, ridge=ridge)
        moves.append(float((fitted.blocks[1].attn.proj.weight - model.blocks[1].attn.proj.weight).norm()))
    assert moves == sorted(moves, reverse=True)
    assert moves[-1] < 1e-6 < moves[0]


@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_spilling_changes_nothing_and_leaves_nothing(mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = build(depth=3)
    images, plan = images_for(model, IMAGES), plan_of(model, mode)
    wanted = state(refitted(model, images, plan))
    assert changed(refitted(model, images, plan, bound=1), wanted) == []
    assert not any(tmp_path.iterdir())


def test_of_very_many_rows_an_even_share_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics of every third row lead to nearly the same weights."""
    model = build(depth=3)
    images, plan = images_for(model, 400), plan_of(model)
    whole = refitted(model, images, plan)
    monkeypatch.setattr(module, "ROWS_PER_FEATURE", 10)
    part = refitted(model, images, plan)
    step = whole.blocks[1].attn.proj.weight - model.blocks[1].attn.proj.weight
    apart = part.blocks[1].attn.proj.weight - whole.blocks[1].attn.proj.weight
    assert 0 < float(apart.norm()) < 0.5 * float(step.norm())


def test_features_that_are_not_numbers_are_refused() -> None:
    model = build(depth=3)
    features = features_of(model, images_for(model, 8))
    with torch.inference_mode():
        features.features[2][0, 0, 0] = float("nan")
    with pytest.raises(InputRejected, match="not finite"):
        compensate(copy.deepcopy(model), features, plan_of(model))


def test_progress_counts_the_blocks_that_are_cut() -> None:
    model = build(depth=3)
    calls: list[tuple[str, int, int]] = []
    plan = make_plan(model, "tiny", [list(range(10)), [0, 1, 4, 5], [0]])
    refitted(model, images_for(model, 8), plan, progress=lambda *call: calls.append(call))
    assert calls == [("compensating", 0, 3), ("compensating", 2, 3), ("compensating", 3, 3)]


def test_blocks_that_end_in_norms_are_not_refitted() -> None:
    model = build(block_fn=ResPostBlock, depth=2)
    assert not can_compensate(model)
    assert all(can_compensate(model_of(kind)) for kind in KINDS)
    found = find_plan(
        model,
        calibration_set("digits", 4),
        PlanRequest(Budget("macs-reduction", 0.3), fit="closed-form"),
        name="tiny",
        transform=create_transform((3, 48, 48)),
    )
    assert found.fit == "none"
    assert found.model is model


@pytest.mark.parametrize("kind", ["class token", "avg", "parallel"])
def test_find_refits_a_copy(kind: str) -> None:
    model = model_of(kind)
    before = state(model)
    found = find_plan(
        model,
        calibration_set("digits", 12),
        PlanRequest(Budget("macs-reduction", 0.4), fit="closed-form"),
        name="tiny",
        transform=create_transform((3, 48, 48)),
    )
    assert found.fit == "closed-form"
    assert changed(model, before) == []
    assert changed(found.model, before)
    assert found.model is not model
