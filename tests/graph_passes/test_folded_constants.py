"""What exporters leave in a graph though it changes nothing: masks that hide nothing, guards, branches that are never taken."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from graph_passes import OnnxModel, Settings, run_passes, slim
from tests.helpers.onnx_models import dense, ort_logits, random_plan, reference

pytestmark = pytest.mark.numeric

HIDDEN = float("-inf")
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def guarded(mask: list[list[float]]) -> onnx.ModelProto:
    """Attention weights as PyTorch exports them under a mask: zero in the place of NaN."""
    nodes = [
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("IsNaN", ["weights"], ["nan"]),
        helper.make_node("Where", ["nan", "zero", "weights"], ["safe"]),
        helper.make_node("MatMul", ["safe", "scores"], ["mixed"]),
    ]
    constants = {"mask": np.array(mask, np.float32), "zero": np.float32(0)}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2, 2]) for name in ("scores", "mixed")]
    graph = helper.make_graph(nodes, "guarded", values[:1], values[1:])
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def answer(model: onnx.ModelProto) -> NDArray[np.float32]:
    scores = np.random.default_rng(0).standard_normal((3, 2, 2), dtype=np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"scores": scores})[0]
    return result


@pytest.mark.parametrize(
    ("mask", "left"),
    [
        ([[0, 0], [0, 0]], ["Softmax", "MatMul"]),
        ([[0]], ["Softmax", "MatMul"]),
        ([[0, HIDDEN], [HIDDEN, 0]], ["Add", "Softmax", "MatMul"]),
        ([[0, 0], [HIDDEN, HIDDEN]], ["Add", "Softmax", "IsNaN", "Where", "MatMul"]),
    ],
)
def test_a_mask_and_its_guard_stay_where_they_do_something(mask: list[list[float]], left: list[str]) -> None:
    model = guarded(mask)
    result = run_passes(model, ["elide_identities"], Settings())
    assert [node.op_type for node in result.model.graph.node] == left
    assert np.isfinite(answer(model)).all()
    np.testing.assert_array_equal(answer(result.model.to_proto()), answer(model))
    assert not run_passes(result.model, ["elide_identities"], Settings()).modified


def test_zeros_that_repeat_what_they_are_added_to_stay() -> None:
    model = guarded([[0, 0], [0, 0]])
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1  # the mask makes two rows of one
    del model.graph.node[4:]
    model.graph.output[0].name = "safe"
    kinds = [node.op_type for node in run_passes(model, ["elide_identities"], Settings()).model.graph.node]
    assert "Add" in kinds


def test_a_branch_that_is_always_taken_takes_the_place_of_its_if() -> None:
    vit, exported = dense("plain")
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    place, gelu = next((index, node) for index, node in enumerate(model.graph.node) if node.op_type == "Gelu")
    branches = {}
    for name, op in (("then_branch", "Gelu"), ("else_branch", "Relu")):
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        branches[name] = helper.make_graph([helper.make_node(op, list(gelu.input), [name])], name, [], [value])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    model.graph.node[place].CopyFrom(helper.make_node("If", ["always"], list(gelu.output), **branches))
    plan = random_plan(vit, 4)
    result = slim(model, plan).model
    assert "If" not in {node.op_type for node in result.graph.node}
    np.testing.assert_allclose(ort_logits(result, IMAGES), reference(vit, plan, IMAGES), atol=1e-4)


def test_an_output_that_an_if_gives_keeps_its_name() -> None:
    branches = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        value = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["b", 2])
        branches[name] = helper.make_graph([helper.make_node(op, ["x"], [f"{name}_out"])], name, [], [value])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 2]) for name in "xy")
    yes = numpy_helper.from_array(np.array(True), "yes")
    graph = helper.make_graph([helper.make_node("If", ["yes"], ["y"], **branches)], "g", [x], [y], [yes])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    folded = run_passes(model, ["fold_constants"], Settings())
    proto = folded.model.to_proto()
    assert folded.modified
    assert "If" not in {node.op_type for node in proto.graph.node}
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(["y"], {"x": np.array([[-1, 2]], np.float32)})[0].tolist() == [[0, 2]]
    assert not run_passes(folded.model, ["fold_constants"], Settings()).modified


def test_a_fixed_batch_of_several_images_is_cut() -> None:
    vit, exported = dense("plain")
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = len(IMAGES)
    plan = random_plan(vit, 4)
    result = slim(OnnxModel.from_proto(model), plan).model
    np.testing.assert_allclose(ort_logits(result, IMAGES), reference(vit, plan, IMAGES), atol=1e-4)
    assert not slim(result, plan).modified
