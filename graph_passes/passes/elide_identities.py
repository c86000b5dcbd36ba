"""Remove nodes that change nothing, left behind by exporters and by earlier passes.

An Identity, a Dropout (at inference), a Cast to the type that is there, a Reshape, Expand or Slice to the shape that is there,
a Transpose that moves nothing, a Concat of one tensor, an Add of zeros (a mask that hides nothing), and PyTorch's guard against
attention weights of NaN where no row is hidden as a whole. A node that gives a graph output stays, so that it keeps its name.

Before: x -> node -> y. After: the readers of y read x. Site: a node.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.analysis.patterns import computed_and_constant, constant_value, integers, produced_by, rows_of_slice
from graph_passes.node_builder import replace_all_uses
from graph_passes.pass_registry import Settings, graph_pass


@graph_pass("elide_identities", after=("cut_tokens",))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of nodes removed."""
    outputs, sites = {id(tensor) for tensor in graph.outputs}, 0
    for node in graph.nodes:
        if any(id(tensor) in outputs for tensor in node.outputs) or (source := _unchanged(node)) is None:
            continue
        replace_all_uses(node.outputs[0], source)
        node.outputs.clear()
        sites += 1
    return sites


def _unchanged(node: gs.Node) -> gs.Tensor | None:
    """The input that a node gives out as it is, if it does."""
    if node.op == "Add" and len(node.inputs) == 2:
        return _beside_zeros(node)
    if node.op == "Where":
        return node.inputs[2] if _guards_nothing(node) else None
    return node.inputs[0] if node.inputs and node.outputs and _is_identity(node) else None


def _beside_zeros(add: gs.Node) -> gs.Tensor | None:
    """The computed operand, where the constant one is zero and does not repeat it."""
    found = computed_and_constant(add)
    if found is None or found[1].any():
        return None
    source, zeros = found
    lengths = list(source.shape or [])[-zeros.ndim :] if zeros.ndim else []
    fits = len(lengths) == zeros.ndim and all(a in (1, b) for a, b in zip(zeros.shape, lengths, strict=True))
    return source if fits else None


def _guards_nothing(where: gs.Node) -> bool:
    """Whether a node is ``0 where the weights are NaN, else the weights`` behind a Softmax of scores of which some are seen."""
    softmax, isnan, otherwise = produced_by(where.inputs[2], "Softmax"), produced_by(where.inputs[0], "IsNaN"), where.inputs[1]
    if (
        softmax is None
        or isnan is None
        or isnan.inputs[0] is not where.inputs[2]
        or (zero := constant_value(otherwise)) is None
    ):
        return False
    masked = produced_by(softmax.inputs[0], "Add")
    found = None if masked is None else computed_and_constant(masked)
    seen = (masked is None or found is not None) and (found is None or np.isfinite(found[1]).any(axis=-1).all())
    return bool(seen and zero.size == 1 and not zero.any() and softmax.attrs.get("axis", -1) in (-1, 3))


def _is_identity(node: gs.Node) -> bool:
    if node.op == "Dropout":
        return len(node.outputs) == 1 or not node.outputs[1].outputs
    if node.op == "Identity" or (node.op == "Concat" and len(node.inputs) == 1):
        return True
    source, result = node.inputs[0], node.outputs[0]
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
