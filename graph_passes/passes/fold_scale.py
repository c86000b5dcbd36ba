"""Fold the attention scale into the weights that give the queries.

``(x W_q + b_q) s = x (W_q s) + b_q s``, so the Mul on the queries goes and the first product follows the projection directly.
With a norm on the queries (qk-norm) the scale goes into that norm's weight and bias, since a norm would undo it before.

Before: q -> (norm) -> Mul by one constant -> MatMul. After: q -> (norm) -> MatMul, with fresh constants. Site: an attention.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.attention import Attention, Linear
from graph_passes.match import MatchFailure, constant, label, make_constant, operands, replace_input
from graph_passes.registry import Settings, graph_pass
from graph_passes.structure import find_structure


@graph_pass("fold_scale")
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of attentions whose scale was folded; raises ``MatchFailure``."""
    blocks = [block for block in find_structure(graph).blocks if block.attention.scale is not None]
    for block in blocks:
        _fold(block.attention, block.site.replace(" ", "_"))
    return len(blocks)


def _fold(attention: Attention, name: str) -> None:
    node = attention.scale
    assert node is not None
    parts = operands(node)
    assert parts is not None  # the matcher saw to it
    unscaled, value = parts
    scale = float(value.reshape(-1)[0])
    if attention.q_norm is not None:
        for index, kind in enumerate(("", "weight", "bias")):
            if index and index < len(attention.q_norm.inputs):
                old = constant(attention.q_norm.inputs[index])
                if old is None:
                    raise MatchFailure(label(attention.q_norm), f"expected a constant {kind} of the norm on the queries")
                attention.q_norm.inputs[index] = make_constant(f"{name}.q_norm.{kind}", _scaled(old, scale, old.size))
    else:
        columns = attention.heads * attention.head_dim
        set_linear(
            attention.queries,
            f"{name}.{'qkv' if attention.packed else 'q'}",
            _scaled(attention.queries.weight, scale, columns),
            None if attention.queries.bias is None else _scaled(attention.queries.bias, scale, columns),
        )
    for reader in list(node.outputs[0].outputs):
        replace_input(reader, node.outputs[0], unscaled)


def _scaled(array: NDArray[np.generic], scale: float, columns: int) -> NDArray[np.generic]:
    """A copy of ``array [..., out]`` whose first ``columns`` are multiplied by ``scale`` in float64, and rounded once."""
    result = array.astype(np.float64)
    result[..., :columns] *= scale
    return result.astype(array.dtype)


def set_linear(linear: Linear, name: str, weight: NDArray[np.generic], bias: NDArray[np.generic] | None) -> None:
    """Give a linear layer fresh constants ``weight [in, out]`` and ``bias [out]``."""
    linear.matmul.inputs[1] = make_constant(f"{name}.weight", weight)
    if linear.add is not None and bias is not None:
        index = next(i for i, tensor in enumerate(linear.add.inputs) if tensor is not linear.matmul.outputs[0])
        linear.add.inputs[index] = make_constant(f"{name}.bias", bias)
