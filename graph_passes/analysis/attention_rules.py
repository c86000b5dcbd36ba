"""What a product, a Softmax or an attention makes of the axes of what it reads: here tokens are related to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_graphsurgeon as gs

from graph_passes.analysis.axes import (
    Axes,
    Axis,
    Batch,
    Mixed,
    Tokens,
    axis_size,
    broadcast,
    canonical,
    has,
    is_spatial,
    tokens_in,
    tokens_of,
)
from graph_passes.analysis.axis_map import Attention, AxisMap, MixingMatrix, TokenTable
from graph_passes.analysis.patterns import MatchFailure, constant_shape, constant_value, label, one_hot_rows


def product_axes(axis_map: AxisMap, node: gs.Node) -> Axes:
    """The axes of a MatMul or Gemm: a linear layer, an attention's scores, its weighted values, or rows that a matrix takes.

    Raises ``MatchFailure`` for any other product.
    """
    site, (left, right) = label(node), (axis_map.of(node.inputs[0]), axis_map.of(node.inputs[1]))
    if node.op == "Gemm" and (right is not None or node.attrs.get("transA", 0)):
        raise MatchFailure(site, "expected a constant second factor, and the first one as it is")
    if left is not None and right is None:
        if constant_value(node.inputs[1]) is None:
            raise MatchFailure(site, "expected constant weights")
        shape = constant_shape(node.inputs[1])
        ensure_features([left[-1]], site, "features times weights; these mix tokens or images")
        width = shape[0] if node.op == "Gemm" and node.attrs.get("transB", 0) else shape[-1]
        outer = broadcast([left[:-2], tuple(canonical([length]) for length in shape[:-2])], site)
        return (*outer, *left[-2:-1], canonical([width]))
    if right is None:
        raise MatchFailure(site, "expected the images or what is computed of them")
    if left is None:
        return _constant_times(axis_map, node, right)
    inner, other = left[-1], right[-2]
    outer = broadcast([left[:-2], right[:-2]], site)
    if has(inner, Tokens):
        behind, tokens, values = axis_map.softmaxes.get(id(node.inputs[0])), tokens_of(inner), tokens_of(other)
        if behind is None or tokens is None or values is None or tokens.names != values.names:
            raise MatchFailure(site, "expected attention weights (a Softmax) over the tokens times their values")
    elif inner != other or is_spatial(inner):
        raise MatchFailure(site, "expected queries and keys of one width")
    else:
        keys = tokens_of(right[-1])
        if keys is not None:
            right = (*right[:-1], (replace(keys, keys=True),))
    return (*outer, left[-2], right[-1])


def _constant_times(axis_map: AxisMap, node: gs.Node, right: Axes) -> Axes:
    """A constant times what is computed: chosen rows, or the scores of constant queries, as in an attention pool."""
    matrix, tokens = constant_value(node.inputs[0]), tokens_of(right[-2])
    if matrix is None:
        matrix_shape = node.inputs[0].shape or []
        if tokens is None and len(matrix_shape) > 1 and isinstance(matrix_shape[-2], int):
            return (*right[:-2], canonical([matrix_shape[-2]]), _as_keys(right[-1]))
        raise MatchFailure(label(node), "expected a constant first factor")
    if tokens is None:
        return (*right[:-2], canonical([matrix.shape[-2]]) if matrix.ndim > 1 else (), _as_keys(right[-1]))
    rows = one_hot_rows(matrix)
    if rows is None:
        if matrix.ndim != 2:
            raise MatchFailure(label(node), "expected tokens to be chosen or mixed by one matrix")
        axis_map.mixing_matrices.append(MixingMatrix(node, matrix, tokens, axis_map.level(node.inputs[1])))
        return (*right[:-2], (Mixed(matrix.shape[0]),), right[-1])
    return (*right[:-2], (Tokens(tuple(tokens.names[row] for row in rows)),), right[-1])


def _as_keys(axis: Axis) -> Axis:
    tokens = tokens_of(axis)
    return axis if tokens is None else (replace(tokens, keys=True),)


def softmax_axes(axis_map: AxisMap, node: gs.Node, axes: Axes) -> Axes:
    """The axes of a Softmax of what has ``axes``; over the keys of an attention it is noted in ``axis_map``.

    Raises ``MatchFailure`` where it is over other places of the image.
    """
    axis = int(node.attrs.get("axis", -1)) % len(axes)
    if not is_spatial(axes[axis]):
        return axes
    tokens = tokens_of(axes[axis])
    if tokens is None or not tokens.keys or axis != len(axes) - 1 or node.op != "Softmax":
        raise MatchFailure(label(node), "expected a Softmax over the tokens that an attention reads, on the last axis")
    axis_map.softmaxes[id(node.outputs[0])] = (_scores_behind(axis_map, node), node)
    return axes


def _scores_behind(axis_map: AxisMap, softmax: gs.Node) -> gs.Node:
    """The product of queries and keys that a Softmax weighs."""
    node = softmax
    while node.op != "MatMul":
        computed = [tensor for tensor in node.inputs if axis_map.depends(tensor)]
        if len(computed) != 1 or not computed[0].inputs:
            raise MatchFailure(label(node), "expected one product of queries and keys before the Softmax")
        node = computed[0].inputs[0]
    return node


def attention_axes(axis_map: AxisMap, node: gs.Node) -> Axes:
    """The axes of an ``Attention`` node (ONNX opset 23), on ``[B, heads, n, width]`` or ``[B, n, heads * width]``.

    Raises ``MatchFailure`` for one with a cache, a causal mask, a mask that is computed, or keys and values of unlike tokens.
    """
    site, (queries, keys, values) = label(node), (axis_map.of(tensor) for tensor in node.inputs[:3])
    present = [tensor for tensor in node.inputs[4:] if tensor.name]
    if queries is None or keys is None or values is None or present or node.attrs.get("is_causal", 0):
        raise MatchFailure(site, "expected queries, keys and values of tokens, with neither a cache nor a causal mask")
    read, tokens = tokens_of(keys[-2]), tokens_of(values[-2])
    if read is None or tokens != read or len(queries) != len(keys):
        raise MatchFailure(site, "expected keys and values of the same tokens, on the axis before the last")
    if len(node.inputs) > 3 and (mask := constant_value(node.inputs[3])) is not None:
        for place, held in ((mask.ndim - 2, tokens_of(queries[-2])), (mask.ndim - 1, replace(read, keys=True))):
            if held is not None and mask.shape[place] == held.size > 1:
                axis_map.tables.append(TokenTable(node, 3, place, held))
    elif len(node.inputs) > 3 and node.inputs[3].name:
        raise MatchFailure(site, "expected a constant mask")
    if len(queries) == 4:
        return (*queries[:-1], values[-1])
    heads = node.attrs.get("q_num_heads", 0) // (node.attrs.get("kv_num_heads", 0) or 1)
    return (*queries[:-1], canonical([axis_size(values[-1]) * max(heads, 1)]))


def record_attention(axis_map: AxisMap, node: gs.Node, level: int) -> None:
    """Note the attention whose last node is ``node``, if it is one, and that its output has been through one more."""
    behind = axis_map.softmaxes.get(id(node.inputs[0])) if node.op == "MatMul" else None
    if id(node.outputs[0]) in axis_map.faults or (behind is None and node.op != "Attention"):
        return
    axes = axis_map.of(node.outputs[0])
    scores, softmax = behind or (node, None)
    read = axis_map.tokens(node.inputs[1])  # of an Attention node the keys, of a mix the values
    if axes is None or read is None:
        return
    queried = tokens_in(axes)
    axis_map.attentions.append(Attention(scores, softmax, node, level, read, queried))
    axis_map.levels[id(node.outputs[0])] = level + 1


def ensure_features(axes: Sequence[Axis], site: str, what: str) -> None:
    """Raise ``MatchFailure`` ("expected ``what``") where one of the axes tells images or tokens apart."""
    if any(is_spatial(axis) or has(axis, Batch) for axis in axes):
        raise MatchFailure(site, f"expected {what}")
