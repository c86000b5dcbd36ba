"""Between an ONNX file's protobuf and the graph that passes work on: import with shapes, export in a stable order, check."""

from __future__ import annotations

import heapq

import onnx
import onnx_graphsurgeon as gs
from onnx import checker, shape_inference

from slimming.door import InputRejected

SHAPE_LIMIT = 2**31 - 1


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` whose shapes are inferred anew; recorded shapes of inner tensors are not trusted.

    Raises ``InputRejected`` where the shapes contradict each other or the model is larger than protobuf's 2 GiB.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    if bare.ByteSize() > SHAPE_LIMIT:
        raise InputRejected("the model is larger than 2 GiB, which the passes do not handle")
    try:
        checker.check_model(bare)
        return shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise InputRejected(f"not a valid ONNX graph: {_first_line(error)}") from error


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """The graph of a model from ``with_shapes``."""
    return gs.import_onnx(model)


def export_model(graph: gs.Graph, like: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as a checked model without inner shapes, with the versions and metadata of ``like``.

    Nodes are in a stable topological order and unused ones are gone, so equal graphs give equal bytes.
    """
    graph.cleanup()
    graph.nodes = sorted_nodes(graph)
    _make_names_unique(graph)
    model = gs.export_onnx(graph)
    del model.graph.value_info[:]
    model.ir_version = like.ir_version
    model.producer_name, model.producer_version = like.producer_name, like.producer_version
    del model.metadata_props[:]
    model.metadata_props.extend(like.metadata_props)
    checker.check_model(model, full_check=True)  # a failure here is a bug in a pass
    return model


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
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name == "":
                continue
            base, number = tensor.name, 0
            while owner.setdefault(tensor.name, tensor) is not tensor:
                number += 1
                tensor.name = f"{base}_{number}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
