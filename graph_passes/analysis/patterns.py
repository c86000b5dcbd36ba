"""Reads nodes and constants of a graph. A failed match names the node at which it stopped and what was expected there."""

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


def produced_by(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    """The node that computes ``tensor`` if its operator is one of ``ops``; else None."""
    if isinstance(tensor, gs.Constant) or not tensor.inputs or tensor.inputs[0].op not in ops:
        return None
    return tensor.inputs[0]


def constant_value(tensor: gs.Tensor) -> NDArray[np.generic] | None:
    """The value of a constant tensor (an initializer or a Constant node's output); None for any other tensor."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    node = produced_by(tensor, "Constant")
    if node is None or "value" not in node.attrs:
        return None
    return np.asarray(node.attrs["value"].values)


def constant_shape(tensor: gs.Tensor) -> tuple[int, ...]:
    """The shape of a constant tensor; the values of an initializer are not read."""
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape)
    value = constant_value(tensor)
    assert value is not None  # the caller knows that it is constant
    return value.shape


def computed_and_constant(node: gs.Node) -> tuple[gs.Tensor, NDArray[np.generic]] | None:
    """A node's computed operand and the value of its constant one, in either order; None where it has not one of each."""
    for one, other in ((0, 1), (1, 0)):
        value = constant_value(node.inputs[other])
        if value is not None and constant_value(node.inputs[one]) is None:
            return node.inputs[one], value
    return None


def integers(tensor: gs.Tensor) -> list[int] | None:
    """The values of a constant integer tensor as a flat list; None for any other tensor."""
    value = constant_value(tensor)
    return None if value is None or value.dtype.kind not in "iu" else [int(v) for v in value.reshape(-1)]


def rows_of_slice(node: gs.Node, lengths: Sequence[int]) -> dict[int, range] | None:
    """The rows that a Slice takes, by axis, of a tensor of shape ``lengths``; None where its bounds are computed."""
    values = [integers(tensor) for tensor in node.inputs[1:]]
    if len(values) < 2 or any(value is None for value in values):
        return None
    starts, ends, *rest = [value for value in values if value is not None]
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        return None
    places = [axis % len(lengths) for axis in axes]
    bounds = zip(places, starts, ends, steps, strict=True)
    return {place: range(lengths[place])[slice(start, _stop(end, step), step)] for place, start, end, step in bounds}


def _stop(end: int, step: int) -> int | None:
    """A Slice's end for Python: ONNX means "to the front" by a very small one."""
    return None if step < 0 and end <= -(2**31) + 1 else end


def one_hot_rows(matrix: NDArray[np.generic]) -> list[int] | None:
    """For each row of a one-hot matrix ``[k, n]`` the column that is 1; None for a matrix that is not one-hot."""
    flat = matrix.reshape(-1, matrix.shape[-1])
    if matrix.size != flat.size or not ((flat == 1).sum(axis=1) == 1).all() or not ((flat != 0).sum(axis=1) == 1).all():
        return None
    return [int(row) for row in flat.argmax(axis=1)]


def is_unpadded(conv: gs.Node) -> bool:
    """Whether a convolution has no padding."""
    return not any(conv.attrs.get("pads", [])) and conv.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
