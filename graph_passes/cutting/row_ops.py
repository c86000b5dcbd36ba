"""Takes rows of a tensor, in the form that the target's compiler knows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.patterns import MatchFailure
from graph_passes.node_builder import NodeBuilder
from graph_passes.pass_registry import CutForm

#: Terms of one weighted sum of rows. Sums are padded to the longest, so that few long ones would take the memory of many.
MOST_TERMS = 8


class RowAxis(NamedTuple):
    """Where a tensor has its rows: its rank, the rows' axis (from 0), and how many rows there are."""

    rank: int
    axis: int
    length: int


def take_rows(build: NodeBuilder, source: gs.Tensor, rows: Sequence[int], at: RowAxis, form: CutForm = "auto") -> gs.Variable:
    """Add the nodes that take ``rows`` (positions on ``at.axis``) of ``source``, and return their output.

    ``auto``: a Slice where the rows follow each other, else a Gather; ``slice``: one Slice for each run of rows, and a Concat;
    ``gather``: a Gather; ``matmul``: a one-hot matrix times the rows.
    Raises ``MatchFailure`` for ``matmul`` where the rows are the last axis.
    """
    runs = _runs(rows)
    if form == "matmul":
        matrix = np.zeros((len(rows), at.length), dtype=source.dtype or np.float32)
        matrix[np.arange(len(rows)), list(rows)] = 1
        return _times_rows(build, build.constant("matrix", matrix), source, at)
    if form == "gather" or (form == "auto" and len(runs) > 1):
        return build.op("Gather", [source, build.constant("indices", list(rows))], {"axis": at.axis})
    if len(runs) == 1:
        return _slice(build, source, runs[0], at.axis)
    parts = [_slice(build.within(f"run_{number}"), source, run, at.axis) for number, run in enumerate(runs)]
    return build.op("Concat", parts, {"axis": at.axis})


def merge_rows(
    build: NodeBuilder,
    source: gs.Tensor,
    rows: tuple[Sequence[int], Sequence[int]],
    weights: tuple[NDArray[np.float64], NDArray[np.float64]],
    at: RowAxis,
    form: CutForm = "auto",
) -> gs.Variable:
    """Add the nodes that merge rows of ``source`` into others, and return their output; ``form`` as in ``take_rows``.

    ``rows``: positions of the k kept and the r dropped rows. ``weights``: ``own [k]`` and ``taken [k, r]``. Kept row i becomes
    ``own[i] * kept[i] + sum_j taken[i, j] * dropped[j]``. Raises ``MatchFailure`` where the rows are the last axis.
    """
    (own, taken), dtype = weights, source.dtype or np.float32
    kept = take_rows(build, source, rows[0], at, form)
    dropped = take_rows(build.within("dropped"), source, rows[1], at, form)
    merged = _times_rows(build.within("merged"), build.constant("taken", taken.astype(dtype)), dropped, at)
    if not (own == 1).all():
        column = own.astype(dtype).reshape(-1, *[1] * (at.rank - 1 - at.axis))
        kept = build.op("Mul", [kept, build.constant("own", column)], name="scaled")
    return build.op("Add", [kept, merged], name="mixed")


def sum_rows(
    build: NodeBuilder,
    source: gs.Tensor,
    rows: tuple[Sequence[int], Sequence[int]],
    weights: tuple[NDArray[np.float64], NDArray[np.float64]],
    at: RowAxis,
) -> gs.Variable:
    """Add the nodes that merge rows of ``source`` into others as ``merge_rows`` does, by weighted sums instead of a product.

    A Gather takes the terms of all sums, ``[k, m]`` for at most m each; a Mul weighs them, and a ReduceSum adds them up. Sums
    of more than ``MOST_TERMS`` rows are sums of sums. Raises ``MatchFailure`` where the rows are the last axis.
    """
    (kept, dropped), (own, taken) = rows, weights
    if at.axis == at.rank - 1:
        raise MatchFailure(f"tensor '{source.name}'", "expected the tokens before the last axis, to add them up")
    sums = [
        [(row, float(own[k])), *((dropped[r], float(taken[k, r])) for r in np.flatnonzero(taken[k]).tolist())]
        for k, row in enumerate(kept)
    ]
    level = 0
    while max(map(len, sums)) > MOST_TERMS:
        parts = [[terms[start : start + MOST_TERMS] for start in range(0, len(terms), MOST_TERMS)] for terms in sums]
        source = _weighted_sums(build.within(f"part_{level}"), source, [part for found in parts for part in found], at)
        number = itertools.count()
        sums, level = [[(next(number), 1.0) for _ in found] for found in parts], level + 1
    return _weighted_sums(build, source, sums, at)


def _weighted_sums(build: NodeBuilder, source: gs.Tensor, sums: list[list[tuple[int, float]]], at: RowAxis) -> gs.Variable:
    """The sums of rows times weights; those of fewer terms than others take their first one again, times 0."""
    most = max(map(len, sums))
    full = [[*terms, *[(terms[0][0], 0.0)] * (most - len(terms))] for terms in sums]
    table = np.asarray([[row for row, _ in terms] for terms in full], dtype=np.int64)
    weights = np.asarray([[weight for _, weight in terms] for terms in full], dtype=source.dtype or np.float32)
    terms = build.op("Gather", [source, build.constant("rows", table)], {"axis": at.axis}, name="terms")
    columns = build.constant("weights", weights.reshape(*weights.shape, *[1] * (at.rank - 1 - at.axis)))
    weighed = build.op("Mul", [terms, columns], name="weighed")
    return build.op("ReduceSum", [weighed, build.constant("over", [at.axis + 1])], {"keepdims": 0}, name="merged")


def _slice(build: NodeBuilder, source: gs.Tensor, run: tuple[int, int], axis: int) -> gs.Variable:
    bounds = {"starts": run[0], "ends": sum(run), "axes": axis}
    return build.op("Slice", [source, *(build.constant(name, [value]) for name, value in bounds.items())])


def _times_rows(build: NodeBuilder, matrix: gs.Constant, source: gs.Tensor, at: RowAxis) -> gs.Variable:
    """``matrix [k, n]`` times the n rows, which a Transpose brings next to the features where they are not."""
    if at.axis == at.rank - 2:
        return build.op("MatMul", [matrix, source])
    if at.axis == at.rank - 1:
        raise MatchFailure(f"tensor '{source.name}'", "expected the tokens before the last axis, to take them by a matrix")
    order = [*(index for index in range(at.rank - 1) if index != at.axis), at.axis, at.rank - 1]
    moved = build.op("Transpose", [source], {"perm": order}, name="rows")
    product = build.op("MatMul", [matrix, moved], name="product")
    return build.op("Transpose", [product], {"perm": [order.index(index) for index in range(at.rank)]})


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """``(first, count)`` of each run of rows that follow each other."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return runs
