"""Follows the tokens of an image through a graph: one rule per operator says what each axis of its output holds.

Nothing here knows an exporter or a name: a graph is understood as far as its operators are. A tensor that no rule explains
carries the node that stopped it and what was expected there; that matters only where an answer depends on it.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_graphsurgeon as gs

from graph_passes.analysis.attention_rules import (
    attention_axes,
    ensure_features,
    product_axes,
    record_attention,
    softmax_axes,
)
from graph_passes.analysis.axes import (
    MAX_TOKENS,
    Axes,
    Axis,
    Batch,
    Gathered,
    Mixed,
    Pixels,
    Tokens,
    axis_size,
    broadcast,
    canonical,
    has,
    is_spatial,
    tokens_of,
)
from graph_passes.analysis.axis_map import AxisMap, TokenTable
from graph_passes.analysis.axis_rules import rearranged
from graph_passes.analysis.foreign_operators import einsum_failure, foreign_operator
from graph_passes.analysis.merge_rules import sum_axes
from graph_passes.analysis.operators import ELEMENTWISE_OPS, NORM_OPS, UNARY_OPS
from graph_passes.analysis.patterns import MatchFailure, constant_shape, constant_value, label

#: What may read tokens that a constant matrix mixes, and the terms of sums of tokens; everything else is refused.
_MIXED_READER_OPS = {"Add", "Cast", "Identity", "Transpose"}
_GATHERED_READER_OPS = {"Mul", "ReduceSum"}


def propagate_axes(nodes: list[gs.Node], images: gs.Variable) -> AxisMap:
    """Follow ``images`` through ``nodes``, which are in topological order and whose constants are folded.

    A node that no rule explains is noted in the map's ``faults``. Raises ``MatchFailure`` where ``images`` are not images of a
    fixed size, ``[batch, channels, height, width]`` or ``[batch, height, width, channels]`` with 1, 3 or 4 channels.
    """
    axis_map = AxisMap(nodes)
    axis_map.axes[id(images)] = _of_images(axis_map, images)
    for node in nodes:
        captured = [tensor for tensor in _captured(node) if axis_map.depends(tensor)]
        if node.op in ("Shape", "Size") or not any(axis_map.depends(tensor) for tensor in [*node.inputs, *captured]):
            continue
        level = max(axis_map.level(tensor) for tensor in [*node.inputs, *captured])
        fault = next((axis_map.faults[id(tensor)] for tensor in node.inputs if id(tensor) in axis_map.faults), None)
        if captured:
            fault = MatchFailure(label(node), "expected no subgraph that reads what is computed of the images")
        try:
            outputs = _explained(axis_map, node) if fault is None else []
        except MatchFailure as failure:
            fault, outputs = failure, []
        for number, tensor in enumerate(node.outputs):
            axis_map.levels[id(tensor)] = level
            if number < len(outputs):
                axis_map.axes[id(tensor)] = outputs[number]
            else:
                axis_map.faults[id(tensor)] = fault or MatchFailure(label(node), "expected its first output to be read only")
        record_attention(axis_map, node, level)
    return axis_map


def _captured(node: gs.Node) -> list[gs.Tensor]:
    """The tensors that the node's subgraphs read, those of the graph around them among them."""
    graphs = [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
    return [tensor for graph in graphs for inner in graph.nodes for tensor in [*inner.inputs, *_captured(inner)]]


def _of_images(axis_map: AxisMap, images: gs.Variable) -> Axes:
    """The axes of the graph's input; the batch is noted in ``axis_map``."""
    shape = list(images.shape or [])
    channels = [axis for axis in (1, 3) if len(shape) == 4 and shape[axis] in (1, 3, 4)]
    sides = [axis for axis in (1, 2, 3) if not channels or axis != channels[0]]
    if len(shape) != 4 or not channels or not all(isinstance(shape[axis], int) for axis in sides):
        expected = f"expected images [batch, channels, height, width] of a fixed size; its shape is {shape}"
        if len(shape) == 4 and any(isinstance(length, str) for length in shape[1:]):
            expected += "; give the size with --image-size"
        raise MatchFailure(f"graph input '{images.name}'", expected)
    axis_map.batch = Batch(shape[0]) if isinstance(shape[0], int) else Batch()
    result: list[Axis] = [(axis_map.batch,), (), (), ()]
    result[channels[0]] = (shape[channels[0]],)
    for number, axis in enumerate(sides):
        result[axis] = (Pixels(number, shape[axis]),)
    return tuple(result)


def _explained(axis_map: AxisMap, node: gs.Node) -> list[Axes]:
    """The axes of a node's outputs; raises ``MatchFailure`` where no rule explains them."""
    inputs = [axis_map.of(tensor) for tensor in node.inputs]
    site = label(node)
    if (foreign := foreign_operator(node)) is not None:
        raise foreign
    first = inputs[0] if inputs else None
    if node.op not in _MIXED_READER_OPS and any(has(axis, Mixed) for axes in inputs for axis in axes or ()):
        raise MatchFailure(site, "expected tokens that a constant matrix mixes to be added to as many others")
    if any(has(axis, Gathered) for axes in inputs for axis in axes or ()):
        if node.op not in _GATHERED_READER_OPS:
            raise MatchFailure(site, "expected rows of tokens that a table takes to be weighed and summed")
        if node.op == "ReduceSum":
            return [sum_axes(axis_map, node)]
    if node.op in UNARY_OPS and first is not None:
        return [_same_weights(axis_map, node, first)]
    if node.op in ELEMENTWISE_OPS:
        return [_elementwise(axis_map, node)]
    if node.op in ("MatMul", "Gemm"):
        return [product_axes(axis_map, node)]
    if node.op == "Attention":
        return [attention_axes(axis_map, node)]
    if node.op in NORM_OPS and first is not None:
        axis = int(node.attrs.get("axis", -1)) % len(first)
        ensure_features(first[axis:], site, "a norm over features")
        return [first]
    if node.op in ("Softmax", "LogSoftmax") and first is not None:
        return [softmax_axes(axis_map, node, first)]
    if node.op == "Concat":
        return [_concat(axis_map, node)]
    if first is not None and not any(is_spatial(axis) for axes in inputs if axes is not None for axis in axes):
        return [_by_shape(tensor, axis_map) for tensor in node.outputs]
    if first is None:
        raise MatchFailure(site, "expected the images or what is computed of them as its first input")
    outputs = rearranged(node, first)
    if outputs is not None:
        return outputs
    if node.op == "Einsum":
        raise einsum_failure(node)
    raise MatchFailure(site, "expected an operator that keeps tokens apart, or an attention")


def _same_weights(axis_map: AxisMap, node: gs.Node, axes: Axes) -> Axes:
    """``axes``; what an elementwise node makes of attention weights are still attention weights."""
    for tensor in node.inputs:
        if id(tensor) in axis_map.softmaxes:
            axis_map.softmaxes[id(node.outputs[0])] = axis_map.softmaxes[id(tensor)]
    return axes


def _elementwise(axis_map: AxisMap, node: gs.Node) -> Axes:
    """Operands side by side; a constant with one row per token becomes a table."""
    inputs = _absorbed([axis_map.of(tensor) for tensor in node.inputs])
    computed = broadcast([axes for axes in inputs if axes is not None], label(node))
    operands = [computed]
    for index, tensor in enumerate(node.inputs):
        if inputs[index] is not None:
            continue
        shape = list(tensor.shape if constant_value(tensor) is None else constant_shape(tensor))
        axes: list[Axis] = []
        for place, length in enumerate(shape):
            beside = place - len(shape) + len(computed)
            axis = computed[beside] if beside >= 0 else ()
            if isinstance(length, int) and length == axis_size(axis) and length > 1:
                if (tokens := tokens_of(axis)) is not None:
                    if constant_value(tensor) is None:
                        raise MatchFailure(label(node), f"expected constants for each token; '{tensor.name}' is computed")
                    axis_map.tables.append(TokenTable(node, index, place, tokens))
                elif has(axis, Tokens):
                    raise MatchFailure(label(node), "expected constants for each token on an axis of their own")
                axes.append(axis)
            else:
                axes.append((length,) if isinstance(length, int) and length > 1 else ())
        operands.append(tuple(axes))
    return _same_weights(axis_map, node, broadcast(operands, label(node)))


def _absorbed(operands: list[Axes | None]) -> list[Axes | None]:
    """The operands of a node, where one is of mixed tokens and the other of as many named ones: both are of those."""
    first, second = operands if len(operands) == 2 else (None, None)
    if first is None or second is None or len(first) != len(second):
        return operands
    pairs = list(zip(first, second, strict=True))
    return [tuple(_named_one(*pair) for pair in pairs), tuple(_named_one(*pair[::-1]) for pair in pairs)]


def _named_one(axis: Axis, other: Axis) -> Axis:
    return other if has(axis, Mixed) and tokens_of(other) is not None and axis_size(axis) == axis_size(other) else axis


def _concat(axis_map: AxisMap, node: gs.Node) -> Axes:
    """Parts one behind the other; constants that join tokens are prefix tokens."""
    found = [axis_map.of(tensor) for tensor in node.inputs]
    rank = next(len(axes) for axes in found if axes is not None)
    place = int(node.attrs["axis"]) % rank
    images = {index for axes in found if axes is not None for index, axis in enumerate(axes) if axis == (axis_map.batch,)}
    parts = [
        axes if axes is not None else _by_shape(tensor, axis_map, images)
        for axes, tensor in zip(found, node.inputs, strict=True)
    ]
    others = [(*axes[:place], (), *axes[place + 1 :]) for axes in parts]
    result = broadcast(others, label(node))
    along = [axes[place] for axes in parts]
    if not any(is_spatial(axis) or has(axis, Batch) for axis in along):
        return (*result[:place], canonical([sum(axis_size(axis) for axis in along)]), *result[place + 1 :])
    names: list[int] = []
    for axis, axes in zip(along, found, strict=True):
        tokens = tokens_of(axis)
        if tokens is None and axes is None and not has(axis, Batch) and axis_size(axis) < MAX_TOKENS:
            fresh = [-1 - len(axis_map.prefix) - number for number in range(axis_size(axis))]
            axis_map.prefix.extend(fresh)
            names.extend(fresh)
        elif tokens is not None:
            names.extend(tokens.names)
        else:
            raise MatchFailure(label(node), "expected tokens, or constant prefix tokens, to be joined")
    return (*result[:place], (Tokens(tuple(names)),), *result[place + 1 :])


def _by_shape(tensor: gs.Tensor, axis_map: AxisMap, images: Collection[int] = ()) -> Axes:
    """The axes of a tensor that holds no token, by its shape alone: what is not known is the batch.

    ``images``: axes where the batch is to be expected, for a graph of a fixed one.
    """
    shape = (constant_shape(tensor) if constant_value(tensor) is not None else tensor.shape) or []
    batch = [
        not isinstance(length, int) or (length == axis_map.batch.size and place in images) for place, length in enumerate(shape)
    ]
    return tuple((axis_map.batch,) if known else canonical([length]) for known, length in zip(batch, shape, strict=True))
