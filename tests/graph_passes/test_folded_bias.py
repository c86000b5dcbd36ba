"""What keys and values are added is folded where that is exact, and axes of length 1 go; where it is not, the graph stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, helper

from graph_passes import run_passes, slim
from graph_passes.pass_registry import Settings
from patchslim.choices import Layout
from tests.helpers.onnx_models import as_proto, edited_model, ort_logits, plan_for, reference, traced

pytestmark = pytest.mark.numeric

ALL = list(range(17))
KEPT = [[0, 2, 5, 6, 9, 11, 14, 16], [0, 2, 5, 6, 9, 11, 14, 16], [0, 5, 11, 16], [0]]
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def sites(kind: str, layout: Layout = "split", kept: list[list[int]] | None = None) -> tuple[dict[str, int], gs.Graph]:
    """How often each pass changed the graph of a model, and the slim graph, which answers as the plan means."""
    model, exported = traced(kind)
    prefix = list(range(model.num_prefix_tokens))
    shifted = [[*prefix, *(token + len(prefix) - 1 for token in block if token)] for block in kept or KEPT]
    plan = plan_for(model, shifted)
    result = slim(exported, plan, layout=layout)
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), reference(model, plan, IMAGES), atol=1e-4)
    return {entry.name: entry.sites for entry in result.results}, gs.import_onnx(as_proto(result.model))


def test_keys_and_values_of_cut_blocks_have_no_bias() -> None:
    found, graph = sites("plain")
    assert found["fold_bias"] == 3
    products = [node for node in graph.nodes if node.name.endswith(".kv.matmul")]
    assert len(products) == 3
    assert all(reader.op != "Add" for product in products for reader in product.outputs[0].outputs)
    queries = [node for node in graph.nodes if node.name.endswith(".q.matmul")]
    assert all(reader.op == "Add" for product in queries for reader in product.outputs[0].outputs)


def test_a_packed_projection_keeps_its_bias_and_its_axes() -> None:
    found, _ = sites("plain", "packed")
    assert (found["fold_bias"], found["drop_unit_axes"]) == (0, 0)


@pytest.mark.parametrize(
    "kind",
    [
        "registers",  # a norm on the keys: a bias before it is no constant behind it
        "layer_scale",  # no bias there
        "packed_gated_mlp",  # the output projection has none that could take the values'
        "norms_inside",  # a norm in front of the output projection
    ],
)
def test_where_it_is_not_exact_the_bias_stays(kind: str) -> None:
    assert sites(kind)[0]["fold_bias"] == 0


def test_a_key_bias_that_something_else_reads_stays() -> None:
    model, exported = traced("plain")
    plan = plan_for(model, KEPT)
    before = [name for name in _default() if name not in ("fold_bias", "to_fp16")]
    graph = gs.import_onnx(as_proto(slim(exported, plan, passes=before).model))
    add = next(node for node in graph.nodes if node.name == "block_0.kv.add")
    sizes = gs.Variable("sizes", dtype=np.int64, shape=[3])
    graph.nodes.append(gs.Node("Shape", "shape", {}, [add.outputs[0]], [sizes]))
    graph.outputs.append(sizes)
    watched = edited_model(graph)
    expected = _answers(watched)
    result = run_passes(watched, ["fold_bias"], Settings(plan))
    assert result.results[0].sites == 2  # the two others
    for name, values in _answers(as_proto(result.model)).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-4)


def _default() -> list[str]:
    from graph_passes import default_passes

    return default_passes("split", "fp32")


def _answers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([each.name for each in session.get_outputs()], session.run(None, {"images": IMAGES.numpy()}), strict=True))


def squeezed(shape: list[int], perm: list[int], axis: int) -> onnx.ModelProto:
    """A graph that reshapes (2, 3, 8) to ``shape``, moves its axes and squeezes one."""
    constants = [
        helper.make_tensor("shape", TensorProto.INT64, [len(shape)], shape),
        helper.make_tensor("axes", TensorProto.INT64, [1], [axis]),
    ]
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=perm),
        helper.make_node("Squeeze", ["b", "axes"], ["c"]),
        helper.make_node("Neg", ["c"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8])
    lengths = np.empty((2, 3, 8)).reshape([length or (2, 3)[place] for place, length in enumerate(shape)]).transpose(perm)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, lengths.squeeze(axis).shape)
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(helper.make_graph(nodes, "squeezed", [x], [y], constants), opset_imports=opset, ir_version=10)


@pytest.mark.parametrize(
    ("shape", "perm", "axis", "sites"),
    [
        ([0, 0, 1, 2, 4], [2, 0, 3, 1, 4], 0, 1),
        ([0, 0, 1, 2, 4], [0, 1, 3, 4, 2], -1, 1),
        ([0, 0, 2, 4, 1], [4, 0, 1, 2, 3], 0, 1),
        ([1, 0, 2, 8], [1, 0, 2, 3], 1, 0),  # the 0 would stand for another axis
    ],
)
def test_an_axis_that_comes_and_goes_is_left_out(shape: list[int], perm: list[int], axis: int, sites: int) -> None:
    model = squeezed(shape, perm, axis)
    import onnxruntime as ort

    x = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    result = run_passes(model, ["drop_unit_axes"], Settings())
    assert result.results[0].sites == sites
    ops = [node.op_type for node in result.model.graph.node]
    assert ("Squeeze" in ops) == (sites == 0)
    answers = [
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for one in (model, as_proto(result.model))
    ]
    np.testing.assert_array_equal(*answers)
