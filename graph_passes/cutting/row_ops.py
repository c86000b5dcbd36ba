"""Takes rows of a tensor, in the form that the target's compiler knows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.patterns import MatchFailure, make_constant
from graph_passes.pass_registry import CutForm


def take_rows(
    graph: gs.Graph, source: gs.Tensor, rows: Sequence[int], shape: tuple[int, int, int], name: str, form: CutForm = "auto"
) -> gs.Variable:
    """Append what takes ``rows`` of ``source``, by position, and return its output; ``shape`` is ``(rank, axis, length)``.

    ``auto`` is a Slice where the rows follow each other, else a Gather; ``slice`` one Slice for each run of rows and a Concat;
    ``gather`` a Gather; ``matmul`` a one-hot matrix times the rows. Raises ``MatchFailure`` for rows that no matrix can take.
    """
    rank, axis, length = shape
    maker = _Maker(graph, source, name)
    runs = _runs(rows)
    if form == "matmul":
        matrix = np.zeros((len(rows), length), dtype=source.dtype or np.float32)
        matrix[np.arange(len(rows)), list(rows)] = 1
        return _by_matrix(maker, make_constant(f"{name}.matrix", matrix), rank, axis)
    if form == "gather" or (form == "auto" and len(runs) > 1):
        return maker.append("Gather", "", [source, make_constant(f"{name}.indices", list(rows))], axis=axis)
    if len(runs) == 1:
        return _run(maker, *runs[0], axis, "")
    parts = [_run(maker, *run, axis, f".run_{number}") for number, run in enumerate(runs)]
    return maker.append("Concat", "", parts, axis=axis)


def mix_rows(
    graph: gs.Graph,
    source: gs.Tensor,
    rows: tuple[Sequence[int], Sequence[int]],
    weights: tuple[NDArray[np.float64], NDArray[np.float64]],
    shape: tuple[int, int, int],
    name: str,
    form: CutForm = "auto",
) -> gs.Variable:
    """Append what mixes rows of ``source``, and return its output; ``shape`` and ``form`` are those of ``take_rows``.

    ``rows`` are (kept, dropped), ``weights`` (own [k], taken [k, r]): each kept row times its own weight, plus ``taken`` times
    the dropped ones. Raises ``MatchFailure`` where rows are the last axis.
    """
    (rank, axis, _), (own, taken), dtype = shape, weights, source.dtype or np.float32
    kept = take_rows(graph, source, rows[0], shape, name, form)
    dropped = take_rows(graph, source, rows[1], shape, f"{name}.dropped", form)
    matrix = make_constant(f"{name}.taken", taken.astype(dtype))
    merged = _by_matrix(_Maker(graph, dropped, f"{name}.merged"), matrix, rank, axis)
    if not (own == 1).all():
        column = own.astype(dtype).reshape(-1, *[1] * (rank - 1 - axis))
        kept = _Maker(graph, kept, f"{name}.scaled").append("Mul", "", [kept, make_constant(f"{name}.own", column)])
    return _Maker(graph, kept, f"{name}.mixed").append("Add", "", [kept, merged])


class _Maker:
    def __init__(self, graph: gs.Graph, source: gs.Tensor, name: str) -> None:
        self.graph, self.source, self.name = graph, source, name

    def append(self, op: str, suffix: str, inputs: Sequence[gs.Tensor], **attrs: object) -> gs.Variable:
        """A node behind the others, and its output."""
        out = gs.Variable(f"{self.name}{suffix}.out", dtype=self.source.dtype)
        self.graph.nodes.append(gs.Node(op, f"{self.name}{suffix}", attrs, list(inputs), [out]))
        return out


def _run(maker: _Maker, first: int, count: int, axis: int, suffix: str) -> gs.Variable:
    bounds = {"starts": first, "ends": first + count, "axes": axis}
    inputs = [make_constant(f"{maker.name}{suffix}.{key}", [value]) for key, value in bounds.items()]
    return maker.append("Slice", suffix, [maker.source, *inputs])


def _by_matrix(maker: _Maker, matrix: gs.Constant, rank: int, axis: int) -> gs.Variable:
    """``matrix [k, n]`` times the rows, which a Transpose brings next to the features where they are not."""
    if axis == rank - 2:
        return maker.append("MatMul", "", [matrix, maker.source])
    if axis == rank - 1:
        raise MatchFailure(
            f"tensor '{maker.source.name}'", "expected the tokens before the last axis, to take them by a matrix"
        )
    order = [*(index for index in range(rank - 1) if index != axis), axis, rank - 1]
    moved = maker.append("Transpose", ".rows", [maker.source], perm=order)
    product = maker.append("MatMul", ".product", [matrix, moved])
    return maker.append("Transpose", "", [product], perm=[order.index(index) for index in range(rank)])


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """``(first, count)`` of each run of rows that follow each other."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return runs
