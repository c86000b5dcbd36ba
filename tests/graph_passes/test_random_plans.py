"""The property that all passes together must have: ``slim(export(dense)) == SlimViT`` on any nested plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_passes import slim
from patchslim.choices import Layout, Mode
from slimming.models.slim_vit import SlimViT
from tests.helpers.onnx_models import SIZES, dense, export_dense, macs_of_graph, ort_logits, random_plan, reference, trace

pytestmark = pytest.mark.numeric

KINDS = st.sampled_from(sorted(SIZES))
MODES = st.sampled_from(["compact", "stale"])
LAYOUTS = st.sampled_from(["split", "packed"])
RUN_TIME_INDEXING = {"TopK", "NonZero", "Where", "ScatterND", "ScatterElements", "Scatter", "GatherND", "GatherElements"}


@settings(max_examples=15, deadline=None)
@given(KINDS, MODES, LAYOUTS, st.integers(0, 10_000))
def test_cutting_the_export_equals_the_slimmed_module(kind: str, mode: Mode, layout: Layout, seed: int) -> None:
    assert_alike(kind, mode, layout, seed)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(KINDS, MODES, LAYOUTS, st.integers(10_001, 100_000))
def test_cutting_the_export_equals_the_slimmed_module_for_many_plans(kind: str, mode: Mode, layout: Layout, seed: int) -> None:
    assert_alike(kind, mode, layout, seed)


def assert_alike(kind: str, mode: Mode, layout: Layout, seed: int) -> None:
    """Cut a tiny model's export by a random plan; it answers as the masked reference and the slimmed module do."""
    model, exported = dense(kind)
    plan = random_plan(model, seed, mode)
    images = torch.randn(1 + seed % 3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    result = slim(exported, plan, layout=layout)
    logits = ort_logits(result.model, images)
    expected = reference(model, plan, images)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    with torch.no_grad():
        np.testing.assert_allclose(logits, SlimViT(model, plan)(images).numpy(), atol=1e-4)
    assert macs_of_graph(result.model) == plan.macs(layout)
    assert not {node.op_type for node in result.model.graph.node} & RUN_TIME_INDEXING
    again = slim(result.model, plan, layout=layout)
    assert not again.modified
    assert again.model.to_proto().SerializeToString() == result.model.to_proto().SerializeToString()


@settings(max_examples=6, deadline=None)
@given(KINDS, MODES, LAYOUTS, st.integers(0, 10_000))
def test_fp16_stays_close(kind: str, mode: Mode, layout: Layout, seed: int) -> None:
    model, exported = dense(kind)
    plan = random_plan(model, seed, mode)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    expected = reference(model, plan, images)
    result = slim(exported, plan, layout=layout, precision="fp16")
    assert np.abs(ort_logits(result.model, images) - expected).max() < 0.01 * np.abs(expected).max()
    assert not slim(result.model, plan, layout=layout, precision="fp16").modified


@pytest.mark.parametrize("export", [trace, pytest.param(export_dense, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_cutting_the_export_equals_exporting_the_slimmed_module(mode: Mode, export: Any) -> None:
    model, exported = dense("plain")
    plan = random_plan(model, 3, mode)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    cut = ort_logits(slim(exported, plan).model, images)
    np.testing.assert_allclose(cut, ort_logits(export(SlimViT(model, plan).eval()), images), atol=1e-4)
