"""Changes what a graph takes and gives: the size of its images, and its outputs. No weight is read."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from graph_passes.onnx_io.graph_convert import export_model, import_graph, with_shapes
from graph_passes.onnx_io.model import OnnxModel
from patchslim.errors import UsageError


def with_image_size(model: OnnxModel, height: int, width: int) -> OnnxModel:
    """The model for images of ``height`` x ``width`` pixels: symbolic sides of its input become numbers, the batch stays.

    Where the channels are symbolic too they become 3, on axis 1. Raises ``UsageError`` where there is not one input of four
    axes, or a fixed side is another one.
    """
    if min(height, width) < 1:
        raise UsageError(f"an image of {height} x {width} pixels: both sides must be at least 1")
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model.skeleton)
    images = _images(skeleton.graph, {*model.weights, *(tensor.name for tensor in skeleton.graph.initializer)})
    dims = images.type.tensor_type.shape.dim
    last = dims[1].dim_value not in (1, 3, 4) and dims[3].dim_value in (1, 3, 4)
    wanted = [(1, height), (2, width)] if last else [(1, dims[1].dim_value or 3), (2, height), (3, width)]
    if any(dims[axis].HasField("dim_value") and dims[axis].dim_value != length for axis, length in wanted):
        shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]
        raise UsageError(f"graph input '{images.name}' is {shape}; its images cannot be {height} x {width}")
    numbers = {dims[axis].dim_param: length for axis, length in wanted if dims[axis].dim_param}
    for axis, length in wanted:
        dims[axis].dim_value = length
    for output in skeleton.graph.output:
        for dim in output.type.tensor_type.shape.dim:
            if dim.dim_param in numbers:
                dim.dim_value = numbers[dim.dim_param]
    del skeleton.graph.value_info[:]  # shapes are inferred anew from these
    return OnnxModel(skeleton, model.weights)


def with_outputs(model: OnnxModel, names: Sequence[str]) -> OnnxModel:
    """The model with these of its outputs only, in this order; nodes and weights that nobody needs any more are gone.

    Raises ``UsageError``, naming the outputs that exist, where one of ``names`` is none of them, for no name or a repeated one.
    """
    there = [output.name for output in model.graph.output]
    unknown = [name for name in names if name not in there]
    if unknown or not names or len(set(names)) < len(names):
        fault = (
            f"no output {', '.join(map(repr, unknown))}"
            if unknown
            else f"outputs {list(names)}: name each once, and one at least"
        )
        raise UsageError(f"{fault}; the graph has {', '.join(there)}")
    if list(names) == there:
        return model
    graph = import_graph(with_shapes(model))
    outputs = {tensor.name: tensor for tensor in graph.outputs}
    graph.outputs = [outputs[name] for name in names]
    return export_model(graph, like=model)


def _images(graph: onnx.GraphProto, constants: set[str]) -> onnx.ValueInfoProto:
    """The one input that has four axes; before IR version 4 ``constants`` are among the inputs as well."""
    inputs = [value for value in graph.input if value.name not in constants]
    found = [value for value in inputs if len(value.type.tensor_type.shape.dim) == 4]
    if len(found) != 1:
        names = ", ".join(f"'{value.name}' of {len(value.type.tensor_type.shape.dim)} axes" for value in inputs) or "none"
        raise UsageError(f"an image size needs one graph input of four axes; found {names}")
    return found[0]
