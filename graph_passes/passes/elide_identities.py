"""Leave out nodes that change nothing: what exporters leave behind, and what earlier passes did.

An Identity, a Dropout (at inference), a Cast to the type that is there, a Reshape, Expand or Slice to the shape that is there,
a Transpose that moves nothing, a Concat of one. Nodes that give a graph output stay, so that it keeps its name.

Before: x -> node -> y. After: the readers of y read x. Site: a node.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.match import integers, replace_input, rows_of_slice
from graph_passes.registry import Settings, graph_pass


@graph_pass("elide_identities")
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of nodes left out."""
    outputs = {id(tensor) for tensor in graph.outputs}
    nodes = [node for node in graph.nodes if not any(id(tensor) in outputs for tensor in node.outputs) and _is_identity(node)]
    for node in nodes:
        for reader in list(node.outputs[0].outputs):
            replace_input(reader, node.outputs[0], node.inputs[0])
        node.outputs.clear()
    return len(nodes)


def _is_identity(node: gs.Node) -> bool:
    if node.op == "Dropout":
        return len(node.outputs) == 1 or not node.outputs[1].outputs
    if node.op == "Identity" or (node.op == "Concat" and len(node.inputs) == 1):
        return True
    source, result = node.inputs[0] if node.inputs else None, node.outputs[0] if node.outputs else None
    if source is None or result is None:
        return False
    if node.op == "Cast":
        return source.dtype is not None and _type(node.attrs["to"]) == source.dtype
    if node.op == "Transpose":
        order = node.attrs.get("perm")
        return order is not None and list(order) == sorted(order)
    shape = list(source.shape or [])
    if node.op == "Slice" and all(isinstance(length, int) for length in shape):
        rows = rows_of_slice(node, shape)
        return rows is not None and all(taken == range(shape[axis]) for axis, taken in rows.items())
    if node.op in ("Reshape", "Expand") and integers(node.inputs[1]) is not None:
        return bool(shape) and shape == list(result.shape or []) and sum(not isinstance(length, int) for length in shape) <= 1
    return False


def _type(number: int) -> object:
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number))
    except (KeyError, ValueError):
        return None
