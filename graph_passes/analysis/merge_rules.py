"""What sums of tokens hold: how merged tokens are recognised that ``cutting.row_ops.sum_rows`` laid."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.axes import Axes, Gathered, Tokens, has
from graph_passes.analysis.axis_map import AxisMap, MixingMatrix
from graph_passes.analysis.patterns import MatchFailure, computed_and_constant, constant_value, integers, label


class _Terms(NamedTuple):
    """The rows ``indices [k, m]`` of ``source`` that are summed, times ``weights [k, m]``."""

    source: gs.Variable
    indices: NDArray[np.int64]
    weights: NDArray[np.float64]


def sum_axes(axis_map: AxisMap, node: gs.Node) -> Axes:
    """The axes of a ReduceSum over rows that a table took: tokens, each named by the first of those that it sums.

    The matrix of all its weights is noted in ``axis_map``; sums of sums are one matrix. Raises ``MatchFailure`` for sums of
    another form.
    """
    axes = axis_map.of(node.inputs[0])
    assert axes is not None
    place = next(index for index, axis in enumerate(axes) if has(axis, Gathered))
    source, indices, weights = _terms(node, place, len(axes))
    tokens = axis_map.tokens(source)
    assert tokens is not None  # of such the Gather took rows
    rows = np.eye(len(tokens.names))
    inner = next((mix for mix in axis_map.mixing_matrices if [mix.node] == source.inputs), None)
    if inner is not None and inner.summed:
        axis_map.mixing_matrices.remove(inner)
        rows, tokens = inner.matrix.astype(np.float64), inner.tokens
    matrix = np.einsum("km,kmn->kn", weights, rows[indices])
    names = axis_map.tokens(source)
    assert names is not None
    axis_map.mixing_matrices.append(MixingMatrix(node, matrix, tokens, axis_map.level(source), summed=True))
    return (*axes[:place], (Tokens(tuple(names.names[row] for row in indices[:, 0])),), *axes[place + 2 :])


def _terms(node: gs.Node, place: int, rank: int) -> _Terms:
    """What a ReduceSum sums: of a Gather by a constant table, weighed by constants, over the axis behind ``place``."""
    chosen = node.attrs.get("axes") or (integers(node.inputs[1]) if len(node.inputs) > 1 else None)
    weighed = node.inputs[0].inputs[0]
    parts = computed_and_constant(weighed) if weighed.op == "Mul" else None
    gather = parts[0].inputs[0] if parts is not None and parts[0].inputs else None
    table = constant_value(gather.inputs[1]) if gather is not None and gather.op == "Gather" else None
    if parts is None or gather is None or table is None or node.attrs.get("keepdims", 1) or chosen is None:
        raise MatchFailure(label(node), "expected a sum of rows that a constant table takes, each times a constant")
    weights = parts[1].reshape(parts[1].shape[-(rank - place) :])
    if [axis % rank for axis in chosen] != [place + 1] or weights.shape != (*table.shape, *[1] * (rank - place - 2)):
        raise MatchFailure(label(node), f"expected one weight for each of {table.size} rows, and the sum of each line of them")
    return _Terms(gather.inputs[0], table.astype(np.int64), weights.reshape(table.shape).astype(np.float64))
