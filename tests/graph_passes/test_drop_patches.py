"""Patches that are never embedded: taken once, masked everywhere, and other stems refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graph_passes import OnnxModel, Settings, run_passes, slim
from graph_passes.pass_registry import CutForm
from patchslim.choices import Layout, Mode
from patchslim.errors import InputRejected
from tests.helpers.onnx_models import (
    dense,
    ort_logits,
    reference,
)
from tests.helpers.patch_plans import PATCHES, exported_model, masked, names, plan_of, stem

pytestmark = pytest.mark.numeric

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "mode", "layout"),
    [
        pytest.param(kind, mode, layout, marks=[pytest.mark.slow] * ((number + (mode == "stale") + (layout == "packed")) % 2))
        for number, kind in enumerate(["plain", "registers", "distilled", "layer_scale", "no_positions"])
        for mode in ("compact", "stale")
        for layout in ("split", "packed")
    ],
)
def test_dropped_patches_are_masked_everywhere(kind: str, mode: Mode, layout: Layout) -> None:
    model, exported = exported_model(kind)
    plan = plan_of(kind, mode)
    settings, passes = Settings(plan, layout), names("drop_patches", layout=layout)
    result = run_passes(exported, passes, settings)
    sites = {entry.name: entry.sites for entry in result.results}
    assert [entry.refused for entry in result.results if entry.refused] == []
    assert (sites["drop_patches"], sites["order_tokens"]) == (1, 0)
    assert sites["cut_tokens"] == 2  # the first two blocks compute all that they now read
    expected = masked(model, plan, IMAGES)
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), expected, atol=1e-4)
    assert np.abs(expected - reference(model, plan, IMAGES)).max() > 1e-3  # else masks would not have mattered
    for again in (run_passes(result.model, passes, settings), slim(result.model, plan, layout=layout)):
        assert not again.modified
        assert [entry.refused for entry in again.results if entry.refused] == []


@pytest.mark.parametrize("cut", ["auto", "slice", "gather", "matmul"])
def test_patches_are_taken_once_in_the_form_asked_for(cut: CutForm) -> None:
    model, exported = dense("plain")
    plan = plan_of("plain")
    result = run_passes(exported, names("drop_patches"), Settings(plan, cut=cut))
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), masked(model, plan, IMAGES), atol=1e-4)
    nodes = result.model.graph.node
    taking = [node.op_type for node in nodes if node.name.startswith("token_order")]
    runs = {"auto": ["Gather"], "gather": ["Gather"], "matmul": ["MatMul"]}
    assert taking == runs.get(cut, ["Slice"] * 7 + ["Concat"])
    assert "Conv" not in {node.op_type for node in nodes}
    shapes = {tensor.name: list(tensor.dims) for tensor in result.model.graph.initializer}
    shapes |= {weight.name: list(weight.shape) for weight in result.model.weights.values()}
    assert [1, 8, 48] in shapes.values()  # positions of the kept tokens only
    assert [1, 17, 48] not in shapes.values()


def test_the_passes_before_need_not_have_run_and_dropping_alone_is_right() -> None:
    model, exported = dense("plain")
    only_first = plan_of("plain", patches=[PATCHES[0]] * 4)
    result = run_passes(exported, ["fold_constants", "drop_patches"], Settings(only_first))
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), masked(model, only_first, IMAGES), atol=1e-4)
    assert not slim(result.model, only_first, passes=["order_tokens", "split_qkv", "cut_tokens"]).modified


def test_a_plan_whose_first_block_keeps_all_drops_no_patch() -> None:
    _, exported = dense("plain")
    plan = plan_of("plain", patches=[range(16), *PATCHES[1:]])
    assert not run_passes(exported, ["drop_patches"], Settings(plan)).modified


def test_other_patches_cannot_be_dropped_from_a_graph_that_lost_some() -> None:
    _, exported = dense("plain")
    dropped = run_passes(exported, ["fold_constants", "drop_patches"], Settings(plan_of("plain"))).model
    for plan in (plan_of("plain", patches=[range(16)] * 4), plan_of("plain", patches=[PATCHES[0][1:], *PATCHES[2:], []])):
        for name in ("drop_patches", "order_tokens", "cut_tokens"):
            with pytest.raises(InputRejected, match="patches of another plan were dropped"):
                slim(dropped, plan, passes=[name])


@pytest.mark.parametrize("name", ["order_tokens", "cut_tokens"])
def test_dropping_behind_the_passes_that_it_goes_before_is_refused(name: str) -> None:
    with pytest.raises(InputRejected, match=f"drop_patches goes before {name}"):
        slim(dense("plain")[1], plan_of("plain"), passes=["fold_constants", name, "drop_patches"])


@pytest.mark.parametrize(
    ("change", "site", "reason"),
    [
        ("two convolutions", "Conv node 'first'", "expected one convolution"),
        ("padding", "Conv node", r"a stride of \[10, 10\], as its kernel, no padding"),
        ("a norm of the grid", "Conv node", "expected its output to be moved"),
    ],
)
def test_other_stems_are_refused_with_node_and_expectation(change: str, site: str, reason: str) -> None:
    model = stem(change)
    result = run_passes(model, ["drop_patches"], Settings(plan_of("plain")))
    with pytest.raises(InputRejected, match=reason):
        slim(model, plan_of("plain"), passes=["drop_patches"])
    assert result.results[0].refused[0].site.startswith(site)
    assert result.model.to_proto() == OnnxModel.from_proto(model).to_proto()
