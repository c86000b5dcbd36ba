"""Types a slim graph as bfloat16, for strongly typed engines: the range of float32, 8 bits of significand."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graph_passes.onnx_io.graph_convert import with_shapes
from graph_passes.onnx_io.model import OnnxModel
from patchslim.errors import InputRejected

FLOAT, BFLOAT16 = int(TensorProto.FLOAT), int(TensorProto.BFLOAT16)
#: ONNX has no bfloat16 of it before opset 22.
_WIDE = "Conv"


def to_bf16(model: OnnxModel) -> OnnxModel:
    """The float32 ``model`` with bfloat16 weights and activations, its inputs and outputs float32.

    The patch embedding's convolution and what is before it stay float32, as do each Softmax, between two Casts, and the
    statistics of LayerNormalization. TensorRT builds it strongly typed; ONNX Runtime has no such kernels for a CPU. Raises
    ``InputRejected`` where the graph is not float32, or has constants in attributes that hold no tensor.
    """
    proto = with_shapes(model).to_proto()
    graph = proto.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    if any(tensor.data_type in (TensorProto.FLOAT16, BFLOAT16) for tensor in graph.initializer):
        raise InputRejected("the graph has weights of 16 bits already: bfloat16 is made of float32")
    wide = _up_to_convolutions(graph.node)
    narrow = [node for index, node in enumerate(graph.node) if index not in wide]
    kept = {name for index in wide for name in graph.node[index].input}
    outputs = {value.name for value in graph.output if value.type.tensor_type.elem_type == FLOAT}
    weights = _weights(graph, kept, {name for node in narrow for name in node.input})
    inside = {name for node in narrow for name in node.output}
    nodes = [graph.node[index] for index in sorted(wide)]
    read = dict.fromkeys(name for node in narrow for name in node.input if name not in inside)
    stored = {tensor.name for tensor in graph.initializer}
    crossing = {name: f"{name}.bf16" for name in read if kinds.get(name) == FLOAT and name not in stored}
    nodes += [_cast(name, typed, BFLOAT16) for name, typed in crossing.items()]
    renamed = crossing | {name: f"{name}.bf16" for name in outputs & inside} | weights
    for node in narrow:
        _check_attributes(node)
        if node.op_type != "Shape":
            node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        if node.op_type == "LayerNormalization":
            _set(node, "stash_type", 1)
        if node.op_type == "Cast" and helper.get_node_attr_value(node, "to") == FLOAT:
            _set(node, "to", BFLOAT16)
        nodes += _softmax(node) if node.op_type == "Softmax" else [node]
    nodes += [_cast(renamed[name], name, FLOAT) for name in sorted(outputs & inside)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    return OnnxModel.from_proto(proto)


def _up_to_convolutions(nodes: Iterable[onnx.NodeProto]) -> set[int]:
    """Indices of the convolutions and of all nodes that they depend on."""
    found, needed = set[int](), set[str]()
    for index, node in reversed(list(enumerate(nodes))):
        if node.op_type == _WIDE or needed & set(node.output):
            found.add(index)
            needed |= set(node.input)
    return found


def _weights(graph: onnx.GraphProto, kept: set[str], narrow: set[str]) -> dict[str, str]:
    """Make the float32 weights that ``narrow`` nodes read bfloat16; one that is also ``kept`` becomes a second one, by name."""
    renamed = {}
    for tensor in list(graph.initializer):
        if tensor.data_type != FLOAT or tensor.name not in narrow:
            continue
        typed = _rounded(tensor)
        if tensor.name in kept:
            typed.name = renamed[tensor.name] = f"{tensor.name}.bf16"
            graph.initializer.append(typed)
        else:
            tensor.CopyFrom(typed)
    return renamed


def _rounded(tensor: onnx.TensorProto) -> onnx.TensorProto:
    import ml_dtypes

    values = numpy_helper.to_array(tensor)
    if not np.isfinite(values).all():
        raise InputRejected(f"initializer '{tensor.name}' has values that are NaN or infinite")
    typed = TensorProto(name=tensor.name, data_type=BFLOAT16, dims=tensor.dims)
    typed.raw_data = values.astype(ml_dtypes.bfloat16).tobytes()
    return typed


def _check_attributes(node: onnx.NodeProto) -> None:
    """Make float32 tensors in attributes bfloat16; raises ``InputRejected`` for constants in other forms."""
    for attribute in node.attribute:
        if attribute.name in ("value_float", "value_floats"):
            raise InputRejected(f"node '{node.name}': expected constants as tensors; fold_constants first")
        if attribute.HasField("t") and attribute.t.data_type == FLOAT:
            attribute.t.CopyFrom(_rounded(attribute.t))


def _softmax(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A Softmax in float32, with a Cast before and one behind it."""
    scores, weights = node.input[0], node.output[0]
    node.input[0], node.output[0] = f"{scores}.fp32", f"{weights}.fp32"
    return [_cast(scores, node.input[0], FLOAT), node, _cast(node.output[0], weights, BFLOAT16)]


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=kind)


def _set(node: onnx.NodeProto, name: str, value: int) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.i = value
            return
    node.attribute.append(helper.make_attribute(name, value))
