"""Scale and shift of a norm go into the layers that read it, where nothing else does; else the norm stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from graph_passes import SlimResult, run_passes
from graph_passes.pass_registry import Settings
from patchslim.choices import Layout
from tests.helpers.onnx_models import as_proto, edited_model, ort_logits, traced

pytestmark = pytest.mark.numeric

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def fold(model: onnx.ModelProto, layout: Layout = "split") -> tuple[int, gs.Graph, SlimResult]:
    result = run_passes(model, ["fold_norm"], Settings(layout=layout))
    return result.results[0].sites, gs.import_onnx(as_proto(result.model)), result


def norms(graph: gs.Graph) -> list[gs.Node]:
    return [node for node in graph.nodes if node.op == "LayerNormalization"]


@pytest.mark.parametrize(
    ("kind", "folded"),
    [
        ("plain", 8),  # two a block; what reads the last one is no product
        ("registers", 8),  # not the norms on queries and keys
        ("layer_scale", 4),  # the projections of queries, keys and values have no bias that could take the shift
        ("packed_gated_mlp", 4),  # nor has that of its MLP
        ("gated_mlp", 8),  # two layers read the second norm of a block
    ],
)
def test_the_answers_stay_and_scale_and_shift_are_gone(kind: str, folded: int) -> None:
    model, exported = traced(kind)
    sites, graph, result = fold(exported)
    bare = [node for node in norms(graph) if len(node.inputs) == 2]
    assert sites == len(bare) == folded
    assert all((node.inputs[1].values == 1).all() for node in bare)
    with torch.no_grad():
        np.testing.assert_allclose(ort_logits(result.model, IMAGES), model(IMAGES).numpy(), atol=1e-4)
    assert not run_passes(result.model, ["fold_norm"], Settings()).modified


def test_a_packed_layout_keeps_its_norms() -> None:
    assert fold(traced("plain")[1], "packed")[0] == 0


def product_behind(norm: gs.Node) -> gs.Node:
    return next(reader for reader in norm.outputs[0].outputs if reader.op == "MatMul")


def read_by_two(graph: gs.Graph) -> None:
    """The norm is read by something else than a product as well."""
    norm = norms(graph)[0]
    residual = next(node for node in graph.nodes if node.op == "Add" and norm.inputs[0] in node.inputs)
    residual.inputs[residual.inputs.index(norm.inputs[0])] = norm.outputs[0]


def given_out(graph: gs.Graph) -> None:
    """The norm is an output of the graph."""
    tensor = norms(graph)[0].outputs[0]
    tensor.dtype, tensor.shape = np.float32, ["batch", 17, 48]
    graph.outputs.append(tensor)


def weight_is_computed(graph: gs.Graph) -> None:
    """The product behind it has no constant weight."""
    product = product_behind(norms(graph)[0])
    weight = product.inputs[1]
    computed = gs.Variable("computed", np.float32, weight.shape)
    graph.nodes.append(gs.Node("Mul", "computed", {}, [weight, gs.Constant("one", np.ones(1, np.float32))], [computed]))
    product.inputs[1] = computed


def no_bias(graph: gs.Graph) -> None:
    """The product behind it is given on as it is."""
    product = product_behind(norms(graph)[0])
    add = product.outputs[0].outputs[0]
    assert add.op == "Add"
    for reader in list(add.outputs[0].outputs):
        reader.inputs[reader.inputs.index(add.outputs[0])] = product.outputs[0]


@pytest.mark.parametrize("edit", [read_by_two, given_out, weight_is_computed, no_bias])
def test_where_it_is_not_exact_the_norm_stays(edit: Callable[[gs.Graph], None]) -> None:
    graph = gs.import_onnx(traced("plain")[1])
    edit(graph)
    edited = edited_model(graph)
    sites, found, result = fold(edited)
    assert sites == 7
    assert len(norms(found)[0].inputs) == 3
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), ort_logits(edited, IMAGES), atol=1e-4)


def test_two_norms_may_read_one_weight() -> None:
    """Tied weights: each product gets one of its own."""
    graph = gs.import_onnx(traced("plain")[1])
    first, second = (product_behind(norm) for norm in (norms(graph)[0], norms(graph)[2]))
    second.inputs[1] = first.inputs[1]
    edited = edited_model(graph)
    sites, _, result = fold(edited)
    assert sites == 8
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), ort_logits(edited, IMAGES), atol=1e-4)
