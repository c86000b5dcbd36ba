"""Small words for reading a graph by pattern. A failed match carries the node it stopped at and what was expected there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray


class MatchFailure(Exception):  # noqa: N818 - an outcome of matching, turned into a Refusal or an InputRejected
    """The graph is not of the form that was looked for.

    Arguments: ``site``, the node (or the part of the graph) where matching stopped; ``expected``, what should have been there.
    """

    def __init__(self, site: str, expected: str) -> None:
        super().__init__(f"{site}: {expected}")
        self.site = site
        self.expected = expected


def label(node: gs.Node) -> str:
    """A node as messages show it: its name (or first output) and its operator."""
    name = node.name or (node.outputs[0].name if node.outputs else "unnamed")
    return f"{node.op} node '{name}'"


def producer(tensor: gs.Tensor, ops: Sequence[str], what: str) -> gs.Node:
    """The node that computes ``tensor``; raises ``MatchFailure`` unless its operator is one of ``ops``."""
    wanted = " or ".join(ops)
    if isinstance(tensor, gs.Constant) or not tensor.inputs:
        raise MatchFailure(f"tensor '{tensor.name}'", f"expected {what}, computed by {wanted}; found no node that computes it")
    node = tensor.inputs[0]
    if node.op not in ops:
        raise MatchFailure(label(node), f"expected {what}, computed by {wanted}")
    return node


def produced_by(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    """The node that computes ``tensor`` where its operator is one of ``ops``, else None."""
    if isinstance(tensor, gs.Constant) or not tensor.inputs or tensor.inputs[0].op not in ops:
        return None
    return tensor.inputs[0]


def only_consumer(tensor: gs.Tensor, what: str) -> gs.Node:
    """The one node that reads ``tensor``; raises ``MatchFailure`` when there is none or there are several."""
    if len(tensor.outputs) != 1:
        site = label(tensor.inputs[0]) if tensor.inputs else f"tensor '{tensor.name}'"
        raise MatchFailure(site, f"expected its output to be read once, by {what}; it is read {len(tensor.outputs)} times")
    return tensor.outputs[0]


def constant(tensor: gs.Tensor) -> NDArray[np.generic] | None:
    """The value of a constant tensor (initializer or Constant node), else None."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    node = produced_by(tensor, "Constant")
    if node is None or "value" not in node.attrs:
        return None
    return np.asarray(node.attrs["value"].values)


def operands(node: gs.Node) -> tuple[gs.Tensor, NDArray[np.generic]] | None:
    """The computed and the constant operand of a two-input node, in either order; None when it has not one of each."""
    for one, other in ((0, 1), (1, 0)):
        value = constant(node.inputs[other])
        if value is not None and constant(node.inputs[one]) is None:
            return node.inputs[one], value
    return None


def integers(tensor: gs.Tensor) -> list[int] | None:
    """A constant integer tensor as a flat list, else None."""
    value = constant(tensor)
    return None if value is None or value.dtype.kind not in "iu" else [int(v) for v in value.reshape(-1)]


def read_slice(node: gs.Node) -> tuple[int, int, int] | None:
    """``(axis, start, end)`` of a Slice with constant bounds on one axis and step 1, else None."""
    if len(node.inputs) < 4:
        return None
    values = [integers(tensor) for tensor in node.inputs[1:]]
    if any(value is None or len(value) != 1 for value in values):
        return None
    start, end, axis = (value[0] for value in values[:3] if value is not None)
    if len(values) > 3 and values[3] != [1]:
        return None
    return axis, start, end


def rows_taken(node: gs.Node, axis: int, rows: int) -> list[int] | None:
    """Row positions that a Slice or Gather takes along ``axis`` out of ``rows``; None when it does something else."""
    if node.op == "Slice":
        bounds = read_slice(node)
        return None if bounds is None or bounds[0] != axis else list(range(rows))[bounds[1] : bounds[2]]
    if node.op == "Gather" and node.attrs.get("axis", 0) == axis:
        taken = integers(node.inputs[1])
        if taken is not None and all(-rows <= t < rows for t in taken):
            return [t % rows for t in taken]
    return None


def static_dim(tensor: gs.Tensor, axis: int, what: str) -> int:
    """A dimension of ``tensor`` that shape inference knows; raises ``MatchFailure`` when it is not static."""
    shape = tensor.shape
    if shape is None or len(shape) <= axis or not isinstance(shape[axis], int):
        raise MatchFailure(f"tensor '{tensor.name}'", f"expected a static {what} on axis {axis}; its shape is {shape}")
    return int(shape[axis])


def make_constant(name: str, values: NDArray[np.generic] | Sequence[int]) -> gs.Constant:
    """A fresh initializer; Python integers become int64. Weights are never changed in place: exporters share them."""
    array = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=np.int64)
    return gs.Constant(name, np.array(array, order="C"))  # ascontiguousarray would make a scalar one-dimensional


def replace_input(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Make ``node`` read ``new`` wherever it reads ``old``."""
    for index, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[index] = new


def take_rows(graph: gs.Graph, source: gs.Tensor, positions: Sequence[int], axis: int, name: str) -> gs.Variable:
    """Append the node that takes ``positions`` of ``source`` along ``axis``: a Slice if they are consecutive, else a Gather."""
    first, count = positions[0], len(positions)
    if list(positions) == list(range(first, first + count)):
        bounds = {"starts": first, "ends": first + count, "axes": axis}
        inputs = [source] + [make_constant(f"{name}.{key}", [value]) for key, value in bounds.items()]
        node = gs.Node("Slice", name, inputs=inputs)
    else:
        node = gs.Node("Gather", name, attrs={"axis": axis}, inputs=[source, make_constant(f"{name}.indices", list(positions))])
    out = gs.Variable(f"{name}.out", dtype=source.dtype)
    node.outputs = [out]
    graph.nodes.append(node)
    return out
