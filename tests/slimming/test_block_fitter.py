"""Algorithm 1 with its fitting: each block's own parameters on a copy, and fewer tokens for the same error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.data import create_transform
from torch import Tensor

from slimming.api import FoundPlan, find_plan
from slimming.data.source import calibration_set
from slimming.fitting.block_sgd import BlockFitter
from slimming.models.reader import ModelReader
from slimming.search.budget import Budget
from slimming.search.features import DenseFeatures, FeatureSettings
from slimming.search.request import PlanRequest
from slimming.search.scores import PaperScore
from slimming.search.top_down import TopDownSearch
from tests.helpers.timm_models import build, images_for

pytestmark = pytest.mark.numeric

TOLERANCE = 0.003
KINDS = ["class_token", "distilled", "eva02_rope", "siglip"]


def features_of(model: Any, mode: Any = "compact", images: int = 16) -> DenseFeatures:
    return DenseFeatures(ModelReader(model), iter(images_for(model, images).split(8)), images, FeatureSettings(mode))


def found_by(model: Any, fit: Any, budget: Budget, mode: Any = "compact", **options: Any) -> FoundPlan:
    size = tuple(model.patch_embed.img_size)
    images = calibration_set("digits", 16)
    return find_plan(
        model, images, PlanRequest(budget, fit=fit, mode=mode, **options), name="tiny", transform=create_transform((3, *size))
    )


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: Any, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_lowers_the_error_and_moves_its_block_alone(kind: str, mode: Any) -> None:
    model = build(kind)
    before = state(model)
    features = features_of(model, mode)
    fitter = BlockFitter(features, lr=3e-4, epochs=10)
    prefix = list(range(features.reader.prefix))
    kept, above = [*prefix, *(features.reader.prefix + patch for patch in (0, 2, 3, 5))], [*prefix, features.reader.prefix + 2]
    start = features.error(1, kept, above)
    with torch.inference_mode():  # as in a search
        end = fitter(1, kept, above)
    assert 0 < end < (start if mode == "stale" else 0.9 * start)
    moved = changed(fitter.model, before)
    assert moved
    assert all(name.startswith("blocks.1.") for name in moved)
    assert changed(model, before) == []
    assert not any(parameter.requires_grad for parameter in [*model.parameters(), *fitter.model.parameters()])


@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_its_error_is_that_of_the_two_fitted_blocks(mode: Any) -> None:
    """E_{l+1} of the copy: block l on its dense input, block l + 1, fitted before, on what l hands over."""
    model = build()
    features = features_of(model, mode)
    fitter = BlockFitter(features, lr=1e-3)
    fitter(2, [0, 1, 3, 4], [0])
    kept, above = [0, 1, 2, 3, 4, 7], [0, 1, 3, 4]
    end = fitter(1, kept, above)
    inputs, target = features.features[1], features.features[3][:, above]
    output = fitter.model.blocks[1](inputs)
    if mode == "stale":
        read = inputs.clone()
        read[:, kept] = output[:, kept]
        slim = fitter.model.blocks[2](read)[:, above]
    else:  # queries see only what is kept
        normed = ModelReader(fitter.model)
        slim = normed.blocks[2].run(normed.view(_kept_only(fitter.model, inputs, kept), kept, above, None))
    each = (slim - target).square().flatten(1).sum(1) / target.square().flatten(1).sum(1)
    assert end == pytest.approx(float(each.mean()), rel=1e-4)


def _kept_only(model: Any, inputs: Tensor, kept: list[int]) -> Tensor:
    """Block 1 of ``model``: every query reads all of the inputs, so that its kept rows are those of the dense block."""
    rows: Tensor = model.blocks[1](inputs)[:, kept]
    return rows


def test_every_trial_starts_at_the_dense_weights() -> None:
    model = build()
    features = features_of(model)
    fitter, again = BlockFitter(features), BlockFitter(features)
    fitter(1, [0, 2], [0])
    found = fitter(1, [0, 2, 3, 5], [0, 2])
    assert again(1, [0, 2, 3, 5], [0, 2]) == found
    assert changed(fitter.model, state(again.model)) == []


def test_a_block_that_is_not_cut_has_its_dense_weights() -> None:
    model = build()
    before = state(model)
    features = features_of(model)
    fitter = BlockFitter(features)
    fitter(1, [0, 2], [0])
    assert changed(fitter.model, before)
    assert fitter(1, list(range(10)), [0]) == 0.0
    assert changed(fitter.model, before) == []
    search = TopDownSearch(features, PaperScore(), fit=BlockFitter(features))
    assert search.by_tolerance(0.0).kept == [list(range(10))] * 3 + [[0]]
    assert isinstance(search.fit, BlockFitter)
    assert changed(search.fit.model, before) == []


@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_fitting_needs_no_more_tokens_for_the_same_tolerance(mode: Any) -> None:
    model = build(patch_size=8)
    before = state(model)
    plain = found_by(model, "none", Budget("tolerance", TOLERANCE), mode)
    fitted = found_by(model, "sgd", Budget("tolerance", TOLERANCE), mode)
    assert fitted.fit == "sgd"
    assert all(few <= many for few, many in zip(fitted.plan.counts, plain.plan.counts, strict=True))
    assert mode == "stale" or sum(fitted.plan.counts) < sum(plain.plan.counts)
    assert max(fitted.plan.origin.errors) <= TOLERANCE
    assert changed(model, before) == []
    assert {name.split(".")[1] for name in changed(fitted.model, before)} == {
        "0",
        "1",
        "2",
    }  # what is above the last is the head


def test_with_a_budget_the_counts_are_those_without_a_fit_and_the_errors_smaller() -> None:
    model = build(patch_size=8)
    before = state(model)
    plain = found_by(model, "none", Budget("macs-reduction", 0.5), score="paper")
    fitted = found_by(model, "sgd", Budget("macs-reduction", 0.5))
    assert fitted.plan.counts == plain.plan.counts
    assert sum(fitted.plan.origin.errors) < sum(plain.plan.origin.errors)
    assert changed(model, before) == []


def test_a_fit_is_the_same_again() -> None:
    model = build()
    one, other = (found_by(model, "sgd", Budget("tolerance", 0.02)) for _ in range(2))
    assert one.plan == other.plan
    assert changed(one.model, state(other.model)) == []


def test_the_copy_is_a_copy() -> None:
    model = build()
    fitter = BlockFitter(features_of(model))
    assert fitter.model is not model
    assert not {id(each) for each in model.parameters()} & {id(each) for each in fitter.model.parameters()}
    assert changed(copy.deepcopy(fitter.model), state(model)) == []
