"""A sound Vision Transformer with one thing wrong in how its nodes, names, types or versions fit together."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.attacks.registry import damage, node, put, weight

INVALID = "not a valid ONNX graph"


@damage(INVALID)
def a_cycle(model: onnx.ModelProto) -> None:
    node(model, "n0").input[0] = "x1"


@damage(INVALID)
def a_node_that_reads_itself(model: onnx.ModelProto) -> None:
    node(model, "y0").input[1] = "y0"


@damage(INVALID)
def nodes_in_a_circle(model: onnx.ModelProto) -> None:
    node(model, "q0").input[0] = "u0"


@damage(INVALID)
def two_nodes_of_one_output(model: onnx.ModelProto) -> None:
    node(model, "g1").output[0] = "g0"
    node(model, "d1").input[0] = "g0"


@damage(INVALID)
def one_output_twice(model: onnx.ModelProto) -> None:
    split = helper.make_node("Split", ["x2"], ["half", "half"], axis=2, num_outputs=2)
    model.graph.node.append(split)


@damage("initializer 'wq0': there are two of this name")
def two_initializers_of_one_name(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(weight(model, "wq0"))


@damage("initializer 'root': there are two of this name")
def two_small_initializers_of_one_name(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(weight(model, "root"))


@damage("initializer 'wq0'|" + INVALID)
def an_initializer_of_either_kind(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add(dims=[8, 8])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "wq0"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), ""))


@damage("expected images as an input; all inputs have initializers")
def an_initializer_for_the_images(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3, 8, 8), np.float32), "images"))


@damage(INVALID)
def an_initializer_that_a_node_computes(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 5, 8), np.float32), "x1"))


@damage(INVALID)
def an_initializer_missing(model: onnx.ModelProto) -> None:
    model.graph.initializer.remove(weight(model, "wq1"))


@damage(INVALID)
def an_initializer_without_a_name(model: onnx.ModelProto) -> None:
    weight(model, "wq1").name = ""
    node(model, "q1").input[1] = ""


@damage(INVALID)
def two_inputs_of_one_name(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


@damage("expected images as the one input that is read; found 'images', 'mask'")
def two_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [5]))
    node(model, "p0").input[0] = "masked"
    model.graph.node.insert(
        list(model.graph.node).index(node(model, "p0")), helper.make_node("Add", ["s0", "mask"], ["masked"])
    )


@damage("images|" + INVALID)
def no_inputs(model: onnx.ModelProto) -> None:
    del model.graph.input[:]


@damage("expected images as an input; there is none")
def images_as_an_initializer(model: onnx.ModelProto) -> None:
    del model.graph.input[:]
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3, 8, 8), np.float32), "images"))


@damage("expected an output; the graph has none")
def no_outputs(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


@damage("nobody")
def an_output_that_nothing_computes(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "nobody"


@damage("no attention")
def the_images_as_the_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].CopyFrom(model.graph.input[0])


@damage("graph output 'x2': expected the head's answer, not 5 tokens")
def tokens_as_the_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("x2", TensorProto.FLOAT, ["batch", 5, 8]))


@damage("graph output 'x1': expected the head's answer, not 5 tokens")
def tokens_as_a_second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("x1", TensorProto.FLOAT, ["batch", 5, 8]))


@damage("graph output 'p0'")
def attention_weights_as_a_second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("p0", TensorProto.FLOAT, ["batch", 2, 5, 5]))


@damage(INVALID)
def an_operator_that_there_is_not(model: onnx.ModelProto) -> None:
    node(model, "g0").op_type = "Gelato"


@damage("domain|'of.nobody'|" + INVALID)
def an_operator_of_an_unknown_domain(model: onnx.ModelProto) -> None:
    node(model, "g0").domain = "of.nobody"


@damage("of 'of.nobody'")
def an_operator_of_somebody(model: onnx.ModelProto) -> None:
    node(model, "g0").domain = "of.nobody"
    model.opset_import.append(helper.make_opsetid("of.nobody", 1))


@damage(INVALID)
def an_operator_without_a_name(model: onnx.ModelProto) -> None:
    node(model, "g0").op_type = ""


@damage(INVALID)
def no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


@damage("opset 9999: ")
def an_opset_of_the_future(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 9999


@damage(INVALID)
def an_opset_below_zero(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = -1


@damage(INVALID)
def an_ir_version_of_the_future(model: onnx.ModelProto) -> None:
    model.ir_version = 1000


@damage(INVALID)
def no_ir_version(model: onnx.ModelProto) -> None:
    model.ClearField("ir_version")


@damage(INVALID)
def an_operand_too_few(model: onnx.ModelProto) -> None:
    del node(model, "s0").input[1:]


@damage(INVALID)
def an_operand_too_many(model: onnx.ModelProto) -> None:
    node(model, "s0").input.append("root")


@damage(INVALID)
def an_operand_left_out(model: onnx.ModelProto) -> None:
    node(model, "s0").input[1] = ""


@damage(INVALID)
def no_operands(model: onnx.ModelProto) -> None:
    del node(model, "p0").input[:]


@damage(INVALID)
def a_node_without_outputs(model: onnx.ModelProto) -> None:
    del node(model, "p0").output[:]


@damage(INVALID)
def an_attribute_missing(model: onnx.ModelProto) -> None:
    del node(model, "all").attribute[:]


@damage(INVALID)
def an_attribute_of_another_type(model: onnx.ModelProto) -> None:
    node(model, "p0").attribute[0].CopyFrom(helper.make_attribute("axis", "last"))


@damage(INVALID)
def an_attribute_twice(model: onnx.ModelProto) -> None:
    node(model, "p0").attribute.append(helper.make_attribute("axis", 0))


@damage(INVALID)
def an_attribute_of_no_type(model: onnx.ModelProto) -> None:
    node(model, "p0").attribute[0].ClearField("type")


@damage("AttributeRef")
def an_attribute_that_is_a_reference(model: onnx.ModelProto) -> None:
    attribute = node(model, "p0").attribute[0]
    attribute.ClearField("i")
    attribute.ref_attr_name = "axis"


@damage(INVALID)
def an_order_of_axes_that_is_none(model: onnx.ModelProto) -> None:
    node(model, "qt0").attribute[0].CopyFrom(helper.make_attribute("perm", [0, 2, 1, 9]))


@damage(INVALID)
def a_softmax_of_integers(model: onnx.ModelProto) -> None:
    node(model, "p0").input[0] = "whole"
    cast = helper.make_node("Cast", ["s0"], ["whole"], to=TensorProto.INT64)
    model.graph.node.insert(list(model.graph.node).index(node(model, "p0")), cast)


@damage(INVALID)
def a_weight_of_another_type(model: onnx.ModelProto) -> None:
    put(model, "wq0", np.zeros((8, 8), np.float64))


@damage(INVALID)
def a_shape_of_floats(model: onnx.ModelProto) -> None:
    put(model, "heads", np.array([0, -1, 2, 4], np.float32))


@damage(INVALID)
def a_weight_of_strings(model: onnx.ModelProto) -> None:
    put(model, "wq0", np.full((8, 8), "weight", object))


@damage(INVALID)
def an_input_of_strings(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING


@damage("initializer 'wq0'|" + INVALID)
def a_weight_of_no_type(model: onnx.ModelProto) -> None:
    weight(model, "wq0").data_type = 0


@damage("initializer 'wq0': its data type 999 is not one of ONNX")
def a_weight_of_a_type_that_there_is_not(model: onnx.ModelProto) -> None:
    weight(model, "wq0").data_type = 999


@damage("images|" + INVALID)
def an_input_of_no_type(model: onnx.ModelProto) -> None:
    model.graph.input[0].ClearField("type")


@damage("images|" + INVALID)
def images_in_a_sequence(model: onnx.ModelProto) -> None:
    element = model.graph.input[0].type.tensor_type
    model.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(helper.make_tensor_type_proto(element.elem_type, [1])))
