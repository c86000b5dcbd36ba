"""Compute ahead of time what does not depend on the images: shapes, and whatever has only constant inputs.

Exporters leave token counts to ``Shape -> Gather -> Concat -> Reshape`` chains, and tables to be computed at run time. The
lengths of a shape are followed one by one, so that a chain with an unknown batch still ends as ``[-1, 197, 192]``; ``start``
and ``end`` of ``Shape`` are taken into account. Everything else is computed by ONNX's own reference implementation.

Before: nodes with constant inputs, and shapes that are computed. After: constants. Random nodes, quantised weights and what
would make the model much larger stay. Site: a node whose output became a constant, or a shape that became one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from graph_passes.analysis.operators import ELEMENTWISE_OPS, UNARY_OPS
from graph_passes.analysis.patterns import MatchFailure, constant_value, label, produced_by, rows_of_slice
from graph_passes.node_builder import NodeBuilder, make_constant, replace_all_uses
from graph_passes.onnx_io.graph_convert import sorted_nodes
from graph_passes.pass_registry import Settings, graph_pass

NEVER_FOLDED_OPS = {
    "DequantizeLinear", "QuantizeLinear", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli",
}  # fmt: skip
MAX_FOLDED_ELEMENTS = 2**24  # elements that a folded tensor may have
#: An array of numbers; or of objects, each a number, the name of a symbolic length, or None for a length that is not known.
Value = NDArray[np.generic]
_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul}


@graph_pass("fold_constants", repeat=True)
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of nodes folded and shapes written down. Raises ``MatchFailure`` where a node cannot be computed."""
    known: dict[int, Value] = {}
    outputs = {id(tensor) for tensor in graph.outputs}
    sites = 0
    for node in sorted_nodes(graph):
        sites += node.op == "If" and _inlined(graph, node)
        if node.op == "Reshape" and (shape := _written_down(node, known)) is not None:
            node.inputs[1] = make_constant(f"{node.outputs[0].name}.shape", shape)
            sites += 1
        sites += node.op in ("Expand", "Tile") and _expands_images(graph, node, known)
        values = _values_of(graph, node, known)
        for tensor, value in zip(node.outputs, values, strict=False):
            if id(tensor) in outputs:
                continue
            if not _is_whole(value):
                known[id(tensor)] = value
                continue
            sites += bool(tensor.outputs)
            result = make_constant(tensor.name, value.astype(tensor.dtype or np.int64) if value.dtype == object else value)
            replace_all_uses(tensor, result)
        if values and not any(tensor.outputs or id(tensor) in outputs for tensor in node.outputs):
            node.outputs.clear()  # else the constant and the node's output would share a name
    return sites


def _inlined(graph: gs.Graph, node: gs.Node) -> bool:
    """Put the branch that a constant condition takes in the place of an If; returns whether it could be done."""
    condition = constant_value(node.inputs[0])
    if condition is None:
        return False
    branch = node.attrs["then_branch" if condition.reshape(-1)[0] else "else_branch"]
    results, outputs = list(node.outputs), {id(tensor) for tensor in graph.outputs}
    node.outputs.clear()
    graph.nodes.extend(branch.nodes)
    for result, inner in zip(results, branch.outputs, strict=True):
        replace_all_uses(result, inner)
        if id(result) in outputs:  # which keeps its name
            NodeBuilder(graph, f"{result.name}.branch").op("Identity", [inner], output=result)
    return True


def _is_whole(value: Value) -> bool:
    """Whether every entry is a number."""
    return value.dtype != object or all(isinstance(entry, int) for entry in value.reshape(-1).tolist())


def _written_down(node: gs.Node, known: dict[int, Value]) -> list[int] | None:
    """A computed shape as a constant: 0 for a length that is the input's own, -1 for one that is not known."""
    value, before = known.get(id(node.inputs[1])), list(node.inputs[0].shape or [])
    if value is None or node.attrs.get("allowzero", 0):
        return None
    lengths = value.reshape(-1).tolist()
    for index, length in enumerate(lengths):
        if not isinstance(length, int):
            copied = isinstance(length, str) and index < len(before) and before[index] == length
            lengths[index] = 0 if copied else -1
    return lengths if lengths.count(-1) < 2 else None


def _expands_images(graph: gs.Graph, node: gs.Node, known: dict[int, Value]) -> bool:
    """Simplify a constant that is repeated for every image; returns whether it was changed.

    Where only elementwise nodes read it, they repeat it by themselves. Elsewhere the shape is written as the images' first
    length before constants, a form that shape inference can follow.
    """
    value, source, images = known.get(id(node.inputs[1])), constant_value(node.inputs[0]), graph.inputs[0]
    first = (images.shape or [None])[0]
    if value is None or source is None or _is_whole(value) or not isinstance(first, str) or len(graph.inputs) != 1:
        return False  # nothing to know, or known, or no batch to write
    lengths = value.reshape(-1).tolist()
    if not all(isinstance(length, int) for length in lengths[1:]) or source.ndim > len(lengths):
        return False
    # A Reshape to [-1, ...] gives the batch another name; what is joined with tokens has their batch all the same.
    if lengths[0] != first and not all(reader.op == "Concat" and reader.attrs["axis"] for reader in node.outputs[0].outputs):
        return False
    if node.op == "Tile":
        if source.ndim != len(lengths) or source.shape[0] != 1 or lengths[1:] != [1] * (len(lengths) - 1):
            return False
        node.op = "Expand"
    if _is_repeated_by_readers(node.outputs[0]):
        repeated = np.broadcast_to(source, np.broadcast_shapes(source.shape, [1, *lengths[1:]]))
        replace_all_uses(node.outputs[0], make_constant(node.outputs[0].name, repeated))
        node.outputs.clear()
        return True
    if _is_of_images(node.inputs[1]):
        return False
    build = NodeBuilder(graph, f"{node.outputs[0].name}.shape", np.int64)
    batch = build.op("Shape", [images], {"start": 0, "end": 1}, name="images", output=build.name_of("batch"))
    rest = build.constant("rest", [int(length) for length in lengths[1:]])
    node.inputs[1] = build.op("Concat", [batch, rest], {"axis": 0}, name="concat", output=build.scope)
    return True


def _is_of_images(shape: gs.Tensor) -> bool:
    """Whether a shape is some tensor's own length and then constants."""
    concat = produced_by(shape, "Concat")
    if concat is None or produced_by(concat.inputs[0], "Shape") is None:
        return False
    return all(constant_value(part) is not None for part in concat.inputs[1:])


def _is_repeated_by_readers(tensor: gs.Tensor) -> bool:
    """Whether all that read a constant put it beside something that is computed, element by element."""
    for reader in tensor.outputs:
        others = [operand for operand in reader.inputs if operand is not tensor]
        if reader.op == "Attention" and reader.inputs[3:4] == [tensor]:
            continue
        if reader.op not in UNARY_OPS | ELEMENTWISE_OPS:
            return False
        if all(constant_value(operand) is not None for operand in others) and not all(
            map(_is_repeated_by_readers, reader.outputs)
        ):
            return False
    return bool(tensor.outputs)


def _values_of(graph: gs.Graph, node: gs.Node, known: dict[int, Value]) -> list[Value]:
    """What is known of a node's outputs; nothing where the list is empty."""
    if node.op in ("Constant", "If") or node.op in NEVER_FOLDED_OPS or node.domain not in (None, "", "ai.onnx"):
        return []
    if node.op == "Shape":
        return _shape(node)
    inputs = [_known(tensor, known) if tensor.name else None for tensor in node.inputs]
    if any(value is None for value, tensor in zip(inputs, node.inputs, strict=True) if tensor.name) or not node.inputs:
        return []
    if any(value is not None and value.dtype == object for value in inputs):
        return _partly(node, inputs)
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return []
    shapes = [tensor.shape for tensor in node.outputs]
    small = all(
        shape is not None and all(isinstance(n, int) for n in shape) and prod(shape) <= MAX_FOLDED_ELEMENTS for shape in shapes
    )
    if not small and sum(value.size for value in inputs if value is not None) > 1024:
        return []
    return _computed(graph, node, inputs)


def _known(tensor: gs.Tensor, known: dict[int, Value]) -> Value | None:
    return known.get(id(tensor)) if id(tensor) in known else constant_value(tensor)


def _shape(node: gs.Node) -> list[Value]:
    shape = node.inputs[0].shape
    if shape is None:
        return []
    lengths = list(shape)[slice(node.attrs.get("start", 0), node.attrs.get("end", None))]
    value = np.empty(len(lengths), dtype=object)
    value[:] = lengths
    return [value]


def _partly(node: gs.Node, inputs: list[Value | None]) -> list[Value]:
    """What is known of a node one of whose inputs is known in part."""
    first, rest = inputs[0], inputs[1:]
    assert first is not None
    if node.op in ("Equal", "Where"):
        return _chosen(node, inputs)
    if any(value is not None and value.dtype == object for value in rest) and node.op not in {"Concat", *_ARITHMETIC}:
        return []
    if node.op == "Gather":
        return [np.asarray(first.take(np.asarray(rest[0]), axis=node.attrs.get("axis", 0)), dtype=object)]
    if node.op == "Concat":
        return [np.concatenate([np.asarray(value, dtype=object).reshape(-1) for value in inputs])]
    if node.op == "Reshape" and np.asarray(rest[0]).size == 1:
        return [first.reshape(-1)]
    if node.op in ("Unsqueeze", "Squeeze") and first.size == 1:
        return [first.reshape([1] if node.op == "Unsqueeze" else [])]
    if node.op in ("Identity", "Cast"):
        return [first] if node.attrs.get("to", onnx.TensorProto.INT64) in _INTEGERS else []
    if node.op == "Slice" and first.ndim == 1 and (rows := rows_of_slice(node, first.shape)) is not None:
        return [first[list(rows.get(0, range(first.size)))]]
    if node.op in _ARITHMETIC and rest[0] is not None:
        pairs = np.broadcast(np.asarray(first, dtype=object), np.asarray(rest[0], dtype=object))
        value = np.empty(pairs.shape, dtype=object)
        value.reshape(-1)[:] = [
            _ARITHMETIC[node.op](*pair) if all(isinstance(length, int | np.integer) for length in pair) else None
            for pair in pairs
        ]
        return [value]
    return []


def _chosen(node: gs.Node, inputs: list[Value | None]) -> list[Value]:
    """``Equal`` and ``Where`` on shapes known in part: a symbolic length is no negative number."""
    broadcast = np.broadcast(*(np.asarray(value, dtype=object) for value in inputs))
    result = np.empty(broadcast.shape, dtype=object)
    flat = result.reshape(-1)
    for index, entries in enumerate(broadcast):
        if node.op == "Where":
            flat[index] = None if entries[0] is None else entries[1] if entries[0] else entries[2]
        elif all(isinstance(entry, int | np.integer) for entry in entries):
            flat[index] = bool(entries[0] == entries[1])
        else:
            negative = any(isinstance(entry, int | np.integer) and entry < 0 for entry in entries)
            flat[index] = False if negative and not any(entry is None for entry in entries) else None
    return [result]


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
