"""Compute ahead of time what does not depend on the images: shapes first of all, then whatever only constants go into.

Exporters leave the token count to ``Shape -> Gather -> Concat -> Reshape`` chains and tables to be made at run time. Known parts
of a shape are followed one by one, so that a chain with an unknown batch in it still ends as ``[-1, 197, 192]``; the
``start`` and ``end`` of ``Shape`` are heeded. Everything else is computed by ONNX's own reference implementation.

Before: nodes with constant inputs, and shapes that are computed. After: constants. Random nodes, quantised weights and what
would make the model much larger stay. Site: a node whose output became a constant, or a shape that was written down.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from graph_passes.match import MatchFailure, constant, label, make_constant, rows_of_slice
from graph_passes.proto import sorted_nodes
from graph_passes.registry import Settings, graph_pass

KEPT = {
    "DequantizeLinear",
    "QuantizeLinear",
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Bernoulli",
}
SHAPED = {"Reshape", "Expand"}
MOST = 2**24  # elements that a folded tensor may have
Value = NDArray[Any]  # of objects, None where an entry is not known, or of numbers
_PARTIAL: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
}


@graph_pass("fold_constants")
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of nodes folded and shapes written down; raises ``MatchFailure`` for a node that cannot be computed."""
    known: dict[int, Value] = {}
    outputs = {id(tensor) for tensor in graph.outputs}
    sites = 0
    for node in sorted_nodes(graph):
        if node.op in SHAPED and (shape := _written_down(node, known)) is not None:
            node.inputs[1] = make_constant(f"{node.outputs[0].name}.shape", shape)
            sites += 1
        values = _values_of(graph, node, known)
        for tensor, value in zip(node.outputs, values, strict=False):
            if id(tensor) in outputs:
                continue
            if value.dtype == object and None in value.reshape(-1).tolist():
                known[id(tensor)] = value
                continue
            sites += bool(tensor.outputs)
            result = make_constant(tensor.name, value.astype(np.int64) if value.dtype == object else value)
            for reader in list(tensor.outputs):
                reader.inputs = [result if operand is tensor else operand for operand in reader.inputs]
    return sites


def _written_down(node: gs.Node, known: dict[int, Value]) -> list[int] | None:
    """A computed shape as a constant, -1 for the one length that is not known."""
    value = known.get(id(node.inputs[1]))
    if value is None:
        return None
    lengths = value.reshape(-1).tolist()
    if lengths.count(None) != 1 or -1 in lengths or node.op == "Expand":
        return None
    return [-1 if length is None else int(length) for length in lengths]


def _values_of(graph: gs.Graph, node: gs.Node, known: dict[int, Value]) -> list[Value]:
    """What is known of a node's outputs; nothing where the list is empty."""
    if node.op == "Constant" or node.op in KEPT or node.domain not in (None, "", "ai.onnx"):
        return []
    if node.op == "Shape":
        return _shape(node)
    inputs = [_known(tensor, known) if tensor.name else None for tensor in node.inputs]
    if any(value is None for value, tensor in zip(inputs, node.inputs, strict=True) if tensor.name) or not node.inputs:
        return []
    if any(value is not None and value.dtype == object for value in inputs):
        return _partly(node, inputs)
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()) or len(node.inputs) == 0:
        return []
    shapes = [tensor.shape for tensor in node.outputs]
    small = all(shape is not None and all(isinstance(n, int) for n in shape) and prod(shape) <= MOST for shape in shapes)
    if not small and sum(value.size for value in inputs if value is not None) > 1024:
        return []
    return _computed(graph, node, inputs)


def _known(tensor: gs.Tensor, known: dict[int, Value]) -> Value | None:
    return known.get(id(tensor)) if id(tensor) in known else constant(tensor)


def _shape(node: gs.Node) -> list[Value]:
    shape = node.inputs[0].shape
    if shape is None:
        return []
    lengths = list(shape)[slice(node.attrs.get("start", 0), node.attrs.get("end", None))]
    value = np.empty(len(lengths), dtype=object)
    value[:] = [length if isinstance(length, int) else None for length in lengths]
    return [value]


def _partly(node: gs.Node, inputs: list[Value | None]) -> list[Value]:
    """What is known of a node one of whose inputs is known in part."""
    first, rest = inputs[0], inputs[1:]
    assert first is not None
    if any(value is not None and value.dtype == object for value in rest) and node.op not in {"Concat", *_PARTIAL}:
        return []
    if node.op == "Gather":
        return [np.asarray(first.take(np.asarray(rest[0]), axis=node.attrs.get("axis", 0)), dtype=object)]
    if node.op == "Concat":
        return [np.concatenate([np.asarray(value, dtype=object).reshape(-1) for value in inputs])]
    if node.op in ("Unsqueeze", "Squeeze", "Reshape") and first.size == 1:
        return [first.reshape([1] if node.op != "Squeeze" else [])]
    if node.op in ("Identity", "Cast"):
        return (
            [first] if node.attrs.get("to", onnx.TensorProto.INT64) in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) else []
        )
    if node.op == "Slice" and first.ndim == 1 and (rows := rows_of_slice(node, first.shape)) is not None:
        return [first[list(rows.get(0, range(first.size)))]]
    if node.op in _PARTIAL and rest[0] is not None:
        pairs = np.broadcast(np.asarray(first, dtype=object), np.asarray(rest[0], dtype=object))
        value = np.empty(pairs.shape, dtype=object)
        value.reshape(-1)[:] = [None if None in pair else _PARTIAL[node.op](*pair) for pair in pairs]
        return [value]
    return []


def _computed(graph: gs.Graph, node: gs.Node, inputs: list[Value | None]) -> list[Value]:
    """The outputs of a node all of whose inputs are constants."""
    attributes = {
        name: numpy_helper.from_array(np.asarray(value.values)) if isinstance(value, gs.Constant) else value
        for name, value in node.attrs.items()
    }
    names = ["" if value is None else f"x{number}" for number, value in enumerate(inputs)]
    proto = helper.make_node(node.op, names, [f"y{number}" for number in range(len(node.outputs))], **attributes)
    feeds = {name: value for name, value in zip(names, inputs, strict=True) if value is not None}
    try:
        results = ReferenceEvaluator(proto, opsets={"": graph.opset}).run(None, feeds)
    except Exception as error:  # whatever the reference implementation stumbles over is the graph's fault
        raise MatchFailure(label(node), f"expected a node that can be computed: {type(error).__name__}: {error}") from error
    return [np.asarray(result) for result in results]
