"""Take the bias out of a projection to keys and values, where nothing else is projected with them.

A key bias adds the same to all scores of a query, which the Softmax takes out again. The weights of a row add up to one, so a
value bias comes out of an attention as it went in, and becomes part of the bias behind it: ``b_o + b_v W_o``. Both are exact;
what was an Add over all tokens of a block is gone. A product with a bias is one kernel in TensorRT, so that this runs for the
layout ``split`` only.

Before: keys and values ``x W + b``. After: ``x W``, where keys and values reach scores and output projection by moves alone,
without norms, rotary angles or gates. Site: an attention.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.axis_map import Attention, AxisMap
from graph_passes.analysis.linear_layers import (
    Columns,
    Linear,
    column_numbers,
    columns_of,
    linear_at,
    moved,
    set_bias,
    shape_for_one_image,
)
from graph_passes.analysis.operators import DATA_MOVEMENT_OPS
from graph_passes.analysis.patterns import constant_value
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.node_builder import replace_all_uses
from graph_passes.pass_registry import Settings, graph_pass


@graph_pass("fold_bias", after=("cut_tokens", "elide_identities"))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of attentions whose keys and values lost their bias. Raises ``MatchFailure``."""
    if settings.layout != "split":
        return 0
    structure = find_structure(graph)
    outputs = {id(tensor) for tensor in graph.outputs}
    return sum(
        _fold(structure.axis_map, attention, outputs, f"{block.site.replace(' ', '_')}" + (f".{number}" if number else ""))
        for block in structure.blocks
        for number, attention in enumerate(block.attentions)
        if attention.softmax is not None
    )


def _fold(axis_map: AxisMap, attention: Attention, outputs: set[int], name: str) -> bool:
    keys, values = (_columns(axis_map, node.inputs[1]) for node in (attention.scores, attention.mix))
    if keys is None or values is None or not _weights_add_up(attention):
        return False
    linears = {id(found.linear.product): found.linear for found in (keys, values)}
    if not all(
        _gives_nothing_else(linear, [keys, values]) and _only_read_by(attention, linear, outputs) for linear in linears.values()
    ):
        return False
    if values.linear.bias is not None:
        behind = _projection_behind(axis_map, attention, values)
        if behind is None or (bias := behind[0].bias) is None:
            return False
        projection, numbers = behind
        terms = values.linear.bias.astype(np.float64)[numbers, None] * projection.weight.astype(np.float64)
        added = terms.sum(axis=0)  # a product by BLAS takes memory for each of its threads
        set_bias(projection, f"{name}.proj.bias", (bias.astype(np.float64) + added).astype(bias.dtype))
    adds = [linear.add for linear in linears.values() if linear.add is not None]
    for add in adds:
        replace_all_uses(add.outputs[0], _computed(add))
    return bool(adds)


def _columns(axis_map: AxisMap, operand: gs.Tensor) -> Columns | None:
    """What projects keys or values, the same for every token; None where it is not so."""
    found = columns_of(operand, axis_map)
    return None if found is None or found.of_one_token(axis_map) is None else found


def _only_read_by(attention: Attention, linear: Linear, outputs: set[int]) -> bool:
    """Whether what a layer gives goes to this attention by moves, and nowhere else."""
    pending: list[gs.Tensor] = [linear.output]
    while pending:
        tensor = pending.pop()
        if id(tensor) in outputs:
            return False
        for reader in tensor.outputs:
            if reader.op in DATA_MOVEMENT_OPS:
                pending.extend(reader.outputs)
            elif reader is not attention.scores and reader is not attention.mix:
                return False
    return True


def _weights_add_up(attention: Attention) -> bool:
    """Whether what weighs the values comes from the Softmax over all keys as it is."""
    softmax = attention.softmax
    return softmax is not None and softmax.attrs.get("axis", -1) in (-1, 3) and attention.mix.inputs[0] is softmax.outputs[0]


def _gives_nothing_else(linear: Linear, read: list[Columns]) -> bool:
    """Whether every column of a layer is a key's or a value's of this attention."""
    taken = column_numbers([found for found in read if found.linear.product is linear.product])
    return np.array_equal(taken, np.arange(linear.weight.shape[1]))


def _computed(add: gs.Node) -> gs.Tensor:
    return next(tensor for tensor in add.inputs if constant_value(tensor) is None)


def _projection_behind(axis_map: AxisMap, attention: Attention, values: Columns) -> tuple[Linear, NDArray[np.int64]] | None:
    """The layer that projects an attention's output, and for each of its inputs the number of the value's column there."""
    tensor = attention.mix.outputs[0]
    shape, one = shape_for_one_image(axis_map, tensor), values.values.take([0], axis=-2)
    if shape is None or len(shape) != one.ndim or shape[-1] != one.shape[-1] or shape[:-2] != one.shape[:-2]:
        return None
    numbers = np.broadcast_to(one, shape)  # the product keeps heads and features where they are
    while len(tensor.outputs) == 1 and tensor.outputs[0].op in DATA_MOVEMENT_OPS and len(tensor.outputs[0].outputs) == 1:
        node = tensor.outputs[0]
        after = moved(node, node.outputs[0], numbers, axis_map)
        if after is None:
            return None
        numbers, tensor = after, node.outputs[0]
    product = tensor.outputs[0] if len(tensor.outputs) == 1 else None
    if product is None or product.op not in ("MatMul", "Gemm"):
        return None
    output = product.outputs[0]
    added = output.outputs[0] if len(output.outputs) == 1 and output.outputs[0].op == "Add" else None
    linear = linear_at(output if added is None else added.outputs[0])
    rows = numbers.reshape(-1, numbers.shape[-1])
    if linear is None or linear.product is not product or not (rows == rows[:1]).all():
        return None
    return (linear, rows[0]) if rows.shape[1] == linear.weight.shape[0] else None
