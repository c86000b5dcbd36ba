"""The axes of a node's outputs where its first input alone decides: moves, parts, reductions, convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_graphsurgeon as gs

from graph_passes.analysis.axes import (
    Axes,
    Axis,
    Batch,
    Gathered,
    Grid,
    Pixels,
    Tokens,
    axis_size,
    broadcast,
    canonical,
    has,
    is_spatial,
    regrouped,
    tokens_of,
)
from graph_passes.analysis.operators import REDUCTION_OPS, SPATIAL_OPS
from graph_passes.analysis.patterns import MatchFailure, constant_value, integers, label, rows_of_slice


def rearranged(node: gs.Node, axes: Axes) -> list[Axes] | None:
    """The axes of a node's outputs where its first input has ``axes``; None for an operator that has no rule here.

    Raises ``MatchFailure`` where the rule needs a constant that is computed, or would divide images or tokens.
    """
    if node.op == "Transpose":
        order = node.attrs.get("perm") or list(reversed(range(len(axes))))
        return [tuple(axes[axis] for axis in order)]
    if node.op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"):
        return [_reshaped(node, axes)]
    if node.op in ("Slice", "Gather", "Split"):
        return _parts(node, axes)
    if node.op in SPATIAL_OPS:
        return [_spatial(node, axes)]
    if node.op in REDUCTION_OPS:
        return [_reduced(node, axes)]
    return None


def _reshaped(node: gs.Node, axes: Axes) -> Axes:
    site, rank = label(node), len(axes)
    if node.op == "Flatten":
        axis = int(node.attrs.get("axis", 1))
        return tuple(canonical([factor for part in group for factor in part]) for group in (axes[:axis], axes[axis:]))
    if node.op in ("Squeeze", "Unsqueeze"):
        chosen = node.attrs.get("axes") or (integers(node.inputs[1]) if len(node.inputs) > 1 else None)
        if chosen is None:
            raise MatchFailure(site, "expected constant axes")
        if node.op == "Unsqueeze":
            left = list(axes)
            for axis in sorted(axis % (rank + len(chosen)) for axis in chosen):
                left.insert(axis, ())
            return tuple(left)
        return tuple(axis for index, axis in enumerate(axes) if index not in {axis % rank for axis in chosen})
    shape = integers(node.inputs[1])
    if shape is None:
        raise MatchFailure(site, f"expected a constant shape; '{node.inputs[1].name}' is computed at run time")
    if node.op == "Expand":
        return broadcast([axes, tuple((length,) if length > 1 else () for length in _unless_there(shape, axes))], site)
    if not node.attrs.get("allowzero", 0):
        shape = [axis_size(axes[index]) if length == 0 and index < rank else length for index, length in enumerate(shape)]
    return regrouped(axes, shape, site)


def _unless_there(shape: Sequence[int], axes: Axes) -> list[int]:
    """The lengths of an Expand that are not there already."""
    have = [1] * (len(shape) - len(axes)) + [axis_size(axis) for axis in axes]
    return [1 if length == there else length for length, there in zip(shape, have[-len(shape) :], strict=True)]


def _parts(node: gs.Node, axes: Axes) -> list[Axes]:
    """What a Slice, Gather or Split takes along one axis (a Slice: along each of its axes in turn)."""
    site = label(node)
    if node.op == "Split":
        place = int(node.attrs.get("axis", 0)) % len(axes)
        length, count = axis_size(axes[place]), len(node.outputs)
        sizes = integers(node.inputs[1]) if len(node.inputs) > 1 else [-(-length // count)] * count
        if sizes is None:
            raise MatchFailure(site, "expected constant sizes")
        starts = [sum(sizes[:number]) for number in range(count)]
        ranges = [range(start, min(start + size, length)) for start, size in zip(starts, sizes, strict=True)]
        return [_taken(axes, place, list(rows), site) for rows in ranges]
    if node.op == "Gather":
        place = int(node.attrs.get("axis", 0)) % len(axes)
        index = constant_value(node.inputs[1])
        terms = tokens_of(axes[place]) is not None and index is not None and index.ndim == 2
        if index is None or (index.ndim > 1 and not terms):
            raise MatchFailure(site, "expected a constant index, or a constant list of them")
        length = axis_size(axes[place])
        if index.size and not -length <= index.min() <= index.max() < length:
            raise MatchFailure(
                site, f"expected indices within an axis of {length}; they go from {index.min()} to {index.max()}"
            )
        if terms:
            return [(*axes[:place], (Gathered(index.shape[0]),), canonical([index.shape[1]]), *axes[place + 1 :])]
        rows = [int(row) % length for row in index.reshape(-1)]
        chosen = _taken(axes, place, rows, site)
        return [chosen if index.ndim else (*chosen[:place], *chosen[place + 1 :])]
    bounds = rows_of_slice(node, [axis_size(axis) for axis in axes])
    if bounds is None:
        raise MatchFailure(site, "expected constant bounds")
    for place, run in bounds.items():
        if run != range(axis_size(axes[place])):
            axes = _taken(axes, place, run, site)
    return [axes]


def _taken(axes: Axes, place: int, rows: Sequence[int], site: str) -> Axes:
    tokens = tokens_of(axes[place])
    if tokens is not None:
        axis: Axis = (replace(tokens, names=tuple(tokens.names[row] for row in rows)),)
    elif is_spatial(axes[place]) or has(axes[place], Batch):
        raise MatchFailure(site, "expected features or whole tokens to be taken")
    else:
        axis = canonical([len(rows)])
    return (*axes[:place], axis, *axes[place + 1 :])


def _spatial(node: gs.Node, axes: Axes) -> Axes:
    """A convolution or pooling on images, before there are tokens."""
    shape = node.outputs[0].shape or []
    if len(axes) != 4 or has(axes[1], Tokens) or not all(has(axis, Pixels, Grid) for axis in axes[2:]):
        raise MatchFailure(label(node), "expected a convolution of images; this one is of tokens")
    if node.attrs.get("group", 1) < 1:
        raise MatchFailure(label(node), "expected at least one group of channels")
    if len(shape) != 4 or not all(isinstance(length, int) for length in shape[1:]):
        raise MatchFailure(label(node), f"expected a fixed patch grid; its shape is {shape}")
    return axes[0], canonical([shape[1]]), (Grid(0, shape[2]),), (Grid(1, shape[3]),)


def _reduced(node: gs.Node, axes: Axes) -> Axes:
    site = label(node)
    chosen = node.attrs.get("axes") or (integers(node.inputs[1]) if len(node.inputs) > 1 else None)
    if chosen is None:
        raise MatchFailure(site, "expected constant axes")
    places = {axis % len(axes) for axis in chosen}
    for place in places:
        if has(axes[place], Pixels, Grid, Batch) or (has(axes[place], Tokens) and node.op != "ReduceMean"):
            raise MatchFailure(site, "expected a mean over tokens, or a reduction over features")
    keep = node.attrs.get("keepdims", 1)
    return tuple(() if index in places else axis for index, axis in enumerate(axes) if keep or index not in places)
