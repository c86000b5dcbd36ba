"""A sound Vision Transformer with an absurd shape in it, or an operator that would make an absurd amount of data."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.attacks.registry import damage, node, put, weight

INVALID = "not a valid ONNX graph"
NO_TENSOR = "initializer 'wq0': its shape .* is not one of a tensor"


def image_size(model: onnx.ModelProto, *sizes: int | str | None) -> None:
    """Give the images another shape."""
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", TensorProto.FLOAT, sizes))


def before_positions(model: onnx.ModelProto, operator: str, inputs: list[str], **attributes: object) -> None:
    """Add to the positions what an operator makes of constants."""
    made = helper.make_node(operator, inputs, ["made"], **attributes)
    added = helper.make_node("Add", ["positions", "made"], ["placed"])
    node(model, "x0").input[1] = "placed"
    model.graph.node.insert(0, added)
    model.graph.node.insert(0, made)


@damage(NO_TENSOR)
def a_negative_length(model: onnx.ModelProto) -> None:
    weight(model, "wq0").dims[:] = [-8, -8]


@damage("initializer 'wq0': 256 bytes of values")
def a_length_of_an_exabyte(model: onnx.ModelProto) -> None:
    weight(model, "wq0").dims[:] = [2**62, 8]


@damage("initializer 'wq0': 256 bytes of values")
def lengths_whose_product_overflows(model: onnx.ModelProto) -> None:
    weight(model, "wq0").dims[:] = [2**32, 2**32, 64]  # zero in 64 bits


@damage("initializer 'wq0'")
def numbers_too_few_for_their_shape(model: onnx.ModelProto) -> None:
    weight(model, "wq0").CopyFrom(TensorProto(name="wq0", data_type=1, dims=[2**40, 2**20], float_data=[1.0]))


@damage("initializer 'root': cannot reshape")
def a_scalar_of_three_numbers(model: onnx.ModelProto) -> None:
    weight(model, "root").CopyFrom(TensorProto(name="root", data_type=1, float_data=[1.0, 2.0, 3.0]))


@damage("initializer 'wq0'|" + INVALID)
def a_weight_without_values(model: onnx.ModelProto) -> None:
    weight(model, "wq0").ClearField("raw_data")


@damage(NO_TENSOR)
def forty_axes(model: onnx.ModelProto) -> None:
    weight(model, "wq0").dims[:] = [8, 8, *[1] * 38]


@damage("expected operands that agree")
def thirty_axes(model: onnx.ModelProto) -> None:
    weight(model, "wq0").dims[:] = [*[1] * 28, 8, 8]


@damage(INVALID)
def a_weight_of_no_rows(model: onnx.ModelProto) -> None:
    put(model, "wq0", np.zeros((0, 8), np.float32))


@damage("expected a Reshape|" + INVALID)
def heads_of_no_width(model: onnx.ModelProto) -> None:
    for name in ("wq0", "wk0"):
        put(model, name, np.zeros((8, 0), np.float32))


@damage("product of 0")
def no_images(model: onnx.ModelProto) -> None:
    image_size(model, 0, 3, 8, 8)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, [0, 3]))


@damage("expected a Reshape of 0 elements")
def images_of_no_height(model: onnx.ModelProto) -> None:
    image_size(model, "batch", 3, 0, 8)


@damage("expected")
def images_of_a_negative_height(model: onnx.ModelProto) -> None:
    image_size(model, "batch", 3, -8, 8)


@damage("expected a Reshape")
def images_of_an_astronomic_height(model: onnx.ModelProto) -> None:
    image_size(model, "batch", 3, 2**62, 8)


@damage("patch grid: expected at most 1000000 patches", alone=True)
def more_patches_than_there_is_memory(model: onnx.ModelProto) -> None:
    image_size(model, "batch", 3, 2**40, 8)
    put(model, "flat", np.array([0, 8, -1], np.int64))
    node(model, "x0").input[1] = "scale"  # fits any number of tokens


@damage("graph input 'images': expected images .* of a fixed size")
def images_of_any_size(model: onnx.ModelProto) -> None:
    image_size(model, "batch", 3, "height", "width")


@damage("graph input 'images': expected images|" + INVALID)
def images_of_no_known_rank(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


@damage(INVALID)
def images_without_axes(model: onnx.ModelProto) -> None:
    image_size(model)


@damage(INVALID)
def images_of_five_axes(model: onnx.ModelProto) -> None:
    image_size(model, "batch", 3, 8, 8, 8)


@damage(INVALID)
def an_output_of_another_shape(model: onnx.ModelProto) -> None:
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1000]))


@damage(INVALID)
def strides_of_zero(model: onnx.ModelProto) -> None:
    node(model, "grid").attribute[1].CopyFrom(helper.make_attribute("strides", [0, 0]))


@damage("expected|" + INVALID)
def strides_below_zero(model: onnx.ModelProto) -> None:
    node(model, "grid").attribute[1].CopyFrom(helper.make_attribute("strides", [-4, -4]))


@damage(INVALID)
def a_kernel_below_zero(model: onnx.ModelProto) -> None:
    node(model, "grid").attribute[0].CopyFrom(helper.make_attribute("kernel_shape", [-4, -4]))


@damage("expected at least one group")
def no_groups(model: onnx.ModelProto) -> None:
    node(model, "grid").attribute.append(helper.make_attribute("group", 0))


@damage("expected|" + INVALID)
def a_reshape_to_more_than_there_is(model: onnx.ModelProto) -> None:
    put(model, "flat", np.array([0, 8, 2**62], np.int64))


@damage("expected|" + INVALID)
def a_reshape_with_two_unknowns(model: onnx.ModelProto) -> None:
    put(model, "heads", np.array([0, -1, -1, 4], np.int64))


@damage("expected|" + INVALID)
def a_reshape_to_minus_two(model: onnx.ModelProto) -> None:
    put(model, "heads", np.array([0, -2, 2, 4], np.int64))


@damage("expected|" + INVALID)
def a_reshape_of_uneven_heads(model: onnx.ModelProto) -> None:
    put(model, "heads", np.array([0, -1, 3, 4], np.int64))


@damage("expected indices within an axis of 5; they go from 7 to 7")
def a_class_token_beyond_the_end(model: onnx.ModelProto) -> None:
    put(model, "zero", np.array(7, np.int64))


@damage("expected", alone=True)
def a_constant_of_a_terabyte(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**35, 5, 8], np.int64), "much"))
    before_positions(model, "ConstantOfShape", ["much"])


@damage("expected", alone=True)
def more_prefix_tokens_than_there_is_memory(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2**38, 8], np.int64), "much"))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["much"], ["prefix"]))
    node(model, "all").input[0] = "prefix"
    node(model, "x0").input[1] = "scale"


@damage("expected|" + INVALID, alone=True)
def an_expansion_to_a_terabyte(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**35, 5, 8], np.int64), "much"))
    before_positions(model, "Expand", ["positions", "much"])


@damage("expected|" + INVALID, alone=True)
def a_tile_of_a_terabyte(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**35, 1, 1], np.int64), "much"))
    before_positions(model, "Tile", ["positions", "much"])


@damage("expected|" + INVALID, alone=True)
def a_padding_of_a_terabyte(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**35, 0, 0, 0, 0, 0], np.int64), "much"))
    before_positions(model, "Pad", ["positions", "much"])


@damage("expected|" + INVALID, alone=True)
def a_range_without_end(model: onnx.ModelProto) -> None:
    for name, value in (("low", 0), ("high", 1e30), ("step", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    before_positions(model, "Range", ["low", "high", "step"])


@damage("expected|" + INVALID)
def a_division_by_zero(model: onnx.ModelProto) -> None:
    for name, value in (("many", 5), ("none", 0)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    divided = helper.make_node("Div", ["many", "none"], ["length"])
    sizes = helper.make_node("Concat", ["batch", "length", "eight"], ["sizes"], axis=0)
    node(model, "sizes").CopyFrom(sizes)
    model.graph.node.insert(0, divided)
