"""Fold every constant scale of an attention into the weights that give the queries.

``(x W_q + b_q) s = x (W_q s) + b_q s``, so a Mul or Div by one constant on the queries, the keys or the scores is not needed,
and the product follows the projection directly, which is the form that engines fuse. With a norm on the queries (qk-norm) the
scale goes into that norm's weight and bias, since the norm would undo it in the projection. Rotary tables and moves are
linear, so the scale may pass them.

Before: scales anywhere between the projections and the Softmax. After: none, and new constants. A scale that cannot reach the
weights stays. Site: an attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.axis_map import Attention, AxisMap
from graph_passes.analysis.linear_layers import Linear, back_to_roots, column_numbers, columns_of, set_bias, set_weight
from graph_passes.analysis.operators import DATA_MOVEMENT_OPS, NORM_OPS
from graph_passes.analysis.patterns import computed_and_constant, constant_value
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.node_builder import make_constant, replace_all_uses
from graph_passes.pass_registry import Settings, graph_pass


@dataclass
class _Target:
    """What a scale goes into: some columns of a linear layer, or norms on the queries."""

    linear: Linear | None
    columns: NDArray[np.int64]
    norms: list[gs.Node]


@graph_pass("fold_scale")
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of attentions whose scale was folded. Raises ``MatchFailure``."""
    structure = find_structure(graph)
    attentions = [(block, number, found) for block in structure.blocks for number, found in enumerate(block.attentions)]
    return sum(
        _fold(structure.axis_map, attention, f"block_{block.index}" + (f".{number}" if number else ""))
        for block, number, attention in attentions
        if attention.softmax is not None
    )


def _fold(axis_map: AxisMap, attention: Attention, name: str) -> bool:
    scales = [
        *_scales_before(attention.scores.inputs[0], attention.scores),
        *_scales_before(attention.scores.inputs[1], attention.scores),
        *_scales_behind(attention),
    ]
    target = _target(axis_map, attention, {id(node) for node, _ in scales}) if scales else None
    if target is None:
        return False
    factor = float(np.prod([value for _, value in scales]))
    for node, _ in scales:
        (source,) = [tensor for tensor in node.inputs if constant_value(tensor) is None]
        replace_all_uses(node.outputs[0], source)
    _scale(target, factor, f"{name}.scaled")
    return True


def _scalar(node: gs.Node) -> float | None:
    """What a Mul or Div by one constant multiplies by."""
    parts = computed_and_constant(node) if node.op in ("Mul", "Div") else None
    if parts is None or parts[1].size != 1 or (node.op == "Div" and node.inputs[0] is not parts[0]):
        return None
    value = float(parts[1].reshape(-1)[0])
    return value if node.op == "Mul" else 1 / value


def _scales_before(tensor: gs.Tensor, reader: gs.Node) -> list[tuple[gs.Node, float]]:
    """Scales on the way to an operand of the scores that nothing else reads."""
    found = []
    while (
        tensor.inputs
        and len(tensor.outputs) == 1
        and tensor.inputs[0].op in {"Mul", "Div", "Neg", *DATA_MOVEMENT_OPS} - {"Split"}
    ):
        node = tensor.inputs[0]
        if (value := _scalar(node)) is not None:
            found.append((node, value))
        elif node.op in ("Mul", "Div", "Neg"):
            break
        tensor = next(source for source in node.inputs if constant_value(source) is None)
    return found


def _scales_behind(attention: Attention) -> list[tuple[gs.Node, float]]:
    """Scales between the scores and the Softmax, before any bias."""
    found, tensor = [], attention.scores.outputs[0]
    while len(tensor.outputs) == 1 and (value := _scalar(tensor.outputs[0])) is not None:
        found.append((tensor.outputs[0], value))
        tensor = tensor.outputs[0].outputs[0]
    return found


def _target(axis_map: AxisMap, attention: Attention, passed: set[int]) -> _Target | None:
    """What gives the queries, linear from there to the scores and read by them alone; None where something is in between."""
    inside = passed | {id(attention.scores)}
    pending, seen, columns, norms = [attention.scores.inputs[0]], {}, [], []
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or constant_value(tensor) is not None:
            continue
        seen[id(tensor)] = tensor
        node = tensor.inputs[0] if tensor.inputs else None
        if (found := columns_of(tensor, axis_map)) is not None:
            columns.append(found)
        elif node is not None and node.op in NORM_OPS:
            norms.append(node)
        elif node is not None and (
            node.op in {"Neg", "Concat", *DATA_MOVEMENT_OPS} or (node.op in ("Mul", "Div") and computed_and_constant(node))
        ):
            inside.add(id(node))
            pending.extend(source for source in node.inputs if axis_map.depends(source))
        elif node is not None and node.op in ("Add", "Sub") and all(axis_map.depends(source) for source in node.inputs):
            inside.add(id(node))
            pending.extend(node.inputs)
        else:
            return None
    if len({id(found.linear.product) for found in columns}) > 1:
        return None
    roots, moves = back_to_roots(columns, axis_map)
    inside |= {id(node) for node in moves}
    read = [*seen.values(), *(root.tensor for root in roots), *(node.inputs[0] for node in moves)]
    if any(id(reader) not in inside for tensor in read for reader in tensor.outputs):
        return None
    return _Target(columns[0].linear if columns else None, column_numbers(columns), norms)


def _scale(target: _Target, factor: float, name: str) -> None:
    if target.linear is not None:
        set_weight(target.linear, f"{name}.weight", _scaled(target.linear.weight, factor, target.columns))
        if target.linear.bias is not None:
            set_bias(target.linear, f"{name}.bias", _scaled(target.linear.bias, factor, target.columns))
    for number, norm in enumerate(target.norms):
        for index, kind in ((1, "weight"), (2, "bias")):
            if index < len(norm.inputs) and (old := constant_value(norm.inputs[index])) is not None:
                values = _scaled(old, factor, np.arange(old.shape[-1]))
                norm.inputs[index] = make_constant(f"{name}.q_norm_{number}.{kind}", values)


def _scaled(array: NDArray[np.generic], factor: float, columns: NDArray[np.int64]) -> NDArray[np.generic]:
    """A copy of ``array [..., out]`` with ``columns`` multiplied by ``factor`` in float64, and rounded once."""
    result = array.copy()
    result[..., columns] = (array[..., columns].astype(np.float64) * factor).astype(array.dtype)
    return result
