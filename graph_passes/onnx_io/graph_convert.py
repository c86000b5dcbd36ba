"""Converts between an ONNX model and the graph that passes work on: import with shapes, export in a stable order, check.

No large weight is read: to ONNX's checker and shape inference, weights are inputs of their type and shape.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import checker, defs, helper, shape_inference
from onnx_graphsurgeon.ir.tensor import LazyValues

from graph_passes.onnx_io.model import OnnxModel, Weight, as_model, is_storable
from patchslim.errors import InputRejected

SHAPE_LIMIT = 2**31 - 1
#: The first IR version in which an initializer need not be an input as well.
_FREE_INITIALIZERS = 4


class LazyWeight(LazyValues):  # type: ignore[misc]
    """The values of a ``gs.Constant`` that are a ``Weight``: loaded when they are asked for, else exported as they are."""

    def __init__(self, weight: Weight) -> None:
        super().__init__(weight.head())
        self.weight = weight
        self.shape = weight.shape

    def load(self) -> NDArray[np.generic]:
        """A view of the weight, not to be written to."""
        return self.weight.load()


def with_shapes(model: OnnxModel | onnx.ModelProto) -> OnnxModel:
    """``model`` with its shapes inferred anew; recorded shapes of inner tensors are not trusted. Weights are shared.

    Raises ``InputRejected`` where shapes contradict each other, more than 2 GiB are not in weights, the graph has no inputs or
    no outputs, or its opset is newer than the installed onnx knows.
    """
    model = as_model(model)
    _ensure_usable(model)
    bare = weights_as_inputs(model)
    del bare.graph.value_info[:]
    if bare.ByteSize() > SHAPE_LIMIT:
        raise InputRejected(
            "the model holds more than 2 GiB outside its initializers, at most 2 GiB is allowed: keep weights in initializers"
        )
    try:
        checker.check_model(bare)
        inferred = shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise InputRejected(f"not a valid ONNX graph: {first_line(error)}") from error
    del inferred.graph.input[:]
    inferred.graph.input.extend(model.graph.input)
    return OnnxModel(inferred, model.weights)


def import_graph(model: OnnxModel) -> gs.Graph:
    """The graph of a model from ``with_shapes``; its large constants are read when a pass asks for their values.

    ``graph.metadata`` has the model's metadata by key; what a pass writes there, ``export_model`` writes into the model.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.skeleton)
    proto.graph.initializer.extend(weight.head() for weight in model.weights.values())
    graph = gs.import_onnx(proto)
    graph.metadata = {entry.key: entry.value for entry in proto.metadata_props}  # graphsurgeon has no place for them
    for tensor in _constants(graph):
        if tensor.name in model.weights:
            tensor.values = LazyWeight(model.weights[tensor.name])
    for subgraph in graph.subgraphs(recursive=True):  # graphsurgeon copies what they read into them when it exports
        for tensor in _constants(subgraph):
            if tensor.name in model.weights:
                tensor.values = LazyValues(model.weights[tensor.name].to_tensor())
    return graph


def export_model(graph: gs.Graph, like: OnnxModel) -> OnnxModel:
    """The graph as a checked model without inner shapes, with the versions of ``like`` and the graph's metadata, or its own.

    Nodes are in a stable topological order and unused ones are gone, with their weights, so equal graphs give equal models.
    Large arrays that passes made become weights as they are.
    """
    _make_names_unique(graph)  # first: graphsurgeon's cleanup goes by names
    graph.cleanup()
    graph.nodes = sorted_nodes(graph)
    weights = _take_weights(graph)
    proto = gs.export_onnx(graph)
    del proto.graph.value_info[:]
    _keep(proto.graph, weights)
    header = like.skeleton
    proto.ir_version = max(header.ir_version, _FREE_INITIALIZERS)
    proto.producer_name, proto.producer_version = header.producer_name, header.producer_version
    del proto.metadata_props[:]
    if (metadata := getattr(graph, "metadata", None)) is None:
        proto.metadata_props.extend(header.metadata_props)
    else:
        helper.set_model_props(proto, metadata)
    model = OnnxModel(proto, weights)
    checker.check_model(weights_as_inputs(model), full_check=True)  # a failure here is a bug in a pass
    return model


def weights_as_inputs(model: OnnxModel) -> onnx.ModelProto:
    """A copy of the skeleton that is valid without the weights."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model.skeleton)
    given = [value for value in model.graph.input if value.name not in model.weights]  # before IR 4 weights are among them
    del bare.graph.input[:]
    bare.graph.input.extend(given)
    bare.graph.input.extend(
        helper.make_tensor_value_info(weight.name, weight.data_type, weight.shape) for weight in model.weights.values()
    )
    return bare


def _ensure_usable(model: OnnxModel) -> None:
    """Raise ``InputRejected`` for what ONNX's checker lets pass, and what no pass can work on."""
    given = {tensor.name for tensor in model.graph.initializer} | model.weights.keys()
    if all(value.name in given for value in model.graph.input):
        found = "all inputs have initializers of their names" if model.graph.input else "there is none"
        raise InputRejected(f"expected images as an input; {found}")
    if not model.graph.output:
        raise InputRejected("expected an output; the graph has none")
    newest = defs.onnx_opset_version()
    for entry in model.skeleton.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > newest:
            raise InputRejected(
                f"opset {entry.version}: onnx {onnx.__version__} knows opsets up to {newest}; install a newer one"
            )


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    return (tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant))


def _take_weights(graph: gs.Graph) -> dict[str, Weight]:
    """The large constants of the graph as weights, which the exporter then writes without their values."""
    inner = {id(tensor) for subgraph in graph.subgraphs(recursive=True) for tensor in _constants(subgraph)}
    weights = {}
    for tensor in _constants(graph):
        values = tensor._values  # .values would read them
        if isinstance(values, LazyWeight):
            weights[tensor.name] = dataclasses.replace(values.weight, name=tensor.name)
        elif isinstance(values, np.ndarray) and is_storable(values) and id(tensor) not in inner:
            weights[tensor.name] = Weight.from_array(tensor.name, values)
            tensor.values = LazyWeight(weights[tensor.name])
    return weights


def _keep(graph: onnx.GraphProto, weights: dict[str, Weight]) -> None:
    """Leave only those initializers in the graph that are not weights."""
    small = [tensor for tensor in graph.initializer if tensor.name not in weights]
    del graph.initializer[:]
    graph.initializer.extend(small)


def sorted_nodes(graph: gs.Graph) -> list[gs.Node]:
    """The nodes in topological order; among nodes that are ready, the one listed first comes first."""
    position = {id(node): index for index, node in enumerate(graph.nodes)}
    waiting: dict[int, int] = {}
    readers: dict[int, list[gs.Node]] = {}
    for node in graph.nodes:
        sources = {id(source) for tensor in node.inputs for source in tensor.inputs if id(source) in position}
        waiting[id(node)] = len(sources)
        for source in sources:
            readers.setdefault(source, []).append(node)
    ready = [position[id(node)] for node in graph.nodes if not waiting[id(node)]]
    result, nodes = [], list(graph.nodes)
    heapq.heapify(ready)
    while ready:
        node = nodes[heapq.heappop(ready)]
        result.append(node)
        for reader in readers.get(id(node), []):
            waiting[id(reader)] -= 1
            if not waiting[id(reader)]:
                heapq.heappush(ready, position[id(reader)])
    return result


def _make_names_unique(graph: gs.Graph) -> None:
    """Rename what a pass made where the model already uses the name: graphsurgeon would merge the two without a word."""
    owner = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
    nodes: dict[str, gs.Node] = {}
    for node in graph.nodes:
        base, number = node.name, 0
        while base and nodes.setdefault(node.name, node) is not node:
            number += 1
            node.name = f"{base}_{number}"
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name == "":
                continue
            base, number = tensor.name, 0
            while owner.setdefault(tensor.name, tensor) is not tensor:
                number += 1
                tensor.name = f"{base}_{number}"


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
