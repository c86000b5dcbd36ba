"""Finds one attention from its Softmax: queries, keys and values back to the first norm, the mix forward to the shortcut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.match import (
    MatchFailure,
    constant,
    integers,
    label,
    only_consumer,
    operands,
    produced_by,
    producer,
    read_slice,
)

FREE = "Identity", "Dropout", "Cast"  # change nothing that matters for matching
POINTWISE = {"Add", "Mul", "Sub", "Div", "MatMul", "Gelu", "Erf", "Relu", "Sigmoid", "Tanh", "Sqrt", *FREE}


@dataclass
class Linear:
    """``source [B, n, in] @ weight [in, out] + bias [out]``: a MatMul and, where there is a bias, an Add."""

    source: gs.Tensor
    matmul: gs.Node
    add: gs.Node | None
    weight: NDArray[np.generic]
    bias: NDArray[np.generic] | None

    @property
    def output(self) -> gs.Variable:
        """The tensor ``[B, n, out]``."""
        return (self.add or self.matmul).outputs[0]


@dataclass
class Attention:
    """One attention ``softmax(q k^T) v`` in one of two forms.

    ``packed``: one linear layer gives q, k and v (``queries is keys_values``). ``split``: ``queries`` gives q of the kept
    tokens and ``keys_values`` gives k and v of all. ``cut`` is the Slice or Gather that chooses the queried rows: in packed
    form on the unpacked queries ``[B, H, n, dh]``, in split form on the norm's output ``[B, n, d]``; None where every row is
    queried.
    """

    softmax: gs.Node
    norm: gs.Node
    queries: Linear
    keys_values: Linear
    q_reshape: gs.Node
    kv_reshape: gs.Node
    out_reshape: gs.Node
    unpacked_q: gs.Variable
    scale: gs.Node | None
    q_norm: gs.Node | None
    cut: gs.Node | None
    heads: int
    head_dim: int
    residual: gs.Node
    shortcut: gs.Tensor

    @property
    def packed(self) -> bool:
        """Whether queries, keys and values come from one linear layer."""
        return self.queries.matmul is self.keys_values.matmul


def is_attention(softmax: gs.Node) -> bool:
    """Whether a Softmax weighs values, as in attention; a classifier's own Softmax does not."""
    readers = list(softmax.outputs[0].outputs)
    while len(readers) == 1 and readers[0].op in FREE:
        readers = list(readers[0].outputs[0].outputs)
    return len(readers) == 1 and readers[0].op == "MatMul" and constant(readers[0].inputs[1]) is None


def back_over(tensor: gs.Tensor, *ops: str) -> gs.Tensor:
    """Walk back over nodes that only pass their first input on."""
    while node := produced_by(tensor, *ops):
        tensor = node.inputs[0]
    return tensor


def match_linear(tensor: gs.Tensor, what: str) -> Linear:
    """The linear layer that computes ``tensor``; raises ``MatchFailure``."""
    add = produced_by(tensor, "Add")
    bias = None
    if add is not None:
        parts = operands(add)
        if parts is None:
            raise MatchFailure(label(add), f"expected the constant bias of {what}")
        tensor, bias = parts
    matmul = producer(tensor, ["MatMul"], what)
    weight = constant(matmul.inputs[1])
    if weight is None or weight.ndim != 2:
        raise MatchFailure(label(matmul), f"expected a constant weight [in, out] for {what}")
    return Linear(matmul.inputs[0], matmul, add, weight, None if bias is None else bias.reshape(-1))


def _unpack(tensor: gs.Tensor, what: str) -> tuple[gs.Node, int]:
    """``(Transpose, index)`` such that ``tensor`` is entry ``index`` of the Transpose's leading axis."""
    node = producer(tensor, ["Squeeze", "Gather"], f"{what} taken out of the packed projection")
    if node.op == "Gather":
        index = integers(node.inputs[1])
        if node.attrs.get("axis", 0) != 0 or index is None or len(index) != 1:
            raise MatchFailure(label(node), f"expected one constant index on axis 0 for {what}")
        return producer(node.inputs[0], ["Transpose"], f"the packed projection of {what}"), index[0]
    if len(node.inputs) < 2 or integers(node.inputs[1]) != [0]:
        raise MatchFailure(label(node), f"expected axis 0 squeezed away from {what}")
    part = producer(node.inputs[0], ["Slice", "Split"], what)
    if part.op == "Split":
        if part.attrs.get("axis", 0) != 0:
            raise MatchFailure(label(part), f"expected a split on axis 0 for {what}")
        position = next(i for i, out in enumerate(part.outputs) if out is node.inputs[0])
        return producer(part.inputs[0], ["Transpose"], f"the packed projection of {what}"), position
    bounds = read_slice(part)
    if bounds is None or bounds[0] != 0 or bounds[2] != bounds[1] + 1:
        raise MatchFailure(label(part), f"expected one constant entry of axis 0 for {what}")
    return producer(part.inputs[0], ["Transpose"], f"the packed projection of {what}"), bounds[1]


def _perm(node: gs.Node, wanted: list[int], what: str) -> None:
    if list(node.attrs.get("perm", [])) != wanted:
        raise MatchFailure(label(node), f"expected perm {wanted} for {what}, found {node.attrs.get('perm')}")


def _heads(reshape: gs.Node, parts: int | None) -> tuple[int, int]:
    """``(heads, head_dim)`` of a Reshape to ``[B, n, (parts,) heads, head_dim]``."""
    shape = integers(reshape.inputs[1])
    leading = 2 if parts is None else 3
    if shape is None or len(shape) != leading + 2 or min(shape[2:]) < 1 or (parts is not None and shape[2] != parts):
        raise MatchFailure(
            label(reshape), f"expected a constant shape [batch, tokens, {parts or ''} heads, head width], found {shape}"
        )
    return shape[-2], shape[-1]


def match_attention(softmax: gs.Node) -> Attention:
    """Read the attention around ``softmax``; raises ``MatchFailure`` with the node that has an unexpected form."""
    if softmax.attrs.get("axis", -1) not in (-1, 3):
        raise MatchFailure(label(softmax), "expected a Softmax over the last axis")
    scores = producer(back_over(softmax.inputs[0], *FREE), ["MatMul"], "the scores q k^T, with neither mask nor bias")
    tensor, scale, q_norm = scores.inputs[0], None, None
    if (node := produced_by(tensor, "Mul")) is not None:
        parts = operands(node)
        if parts is None or parts[1].size != 1:
            raise MatchFailure(label(node), "expected the queries multiplied by one constant scale")
        scale, tensor = node, parts[0]
    if (node := produced_by(tensor, "LayerNormalization")) is not None:
        q_norm, tensor = node, node.inputs[0]
    cut = None
    if (node := produced_by(tensor, "Slice", "Gather")) is not None and not _takes_entry(node):
        cut, tensor = node, node.inputs[0]

    swap = producer(scores.inputs[1], ["Transpose"], "transposed keys")
    _perm(swap, [0, 1, 3, 2], "transposed keys")
    keys = back_over(swap.inputs[0], "LayerNormalization")
    mix = softmax.outputs[0]
    while (reader := only_consumer(mix, "the product with the values")).op in FREE:
        mix = reader.outputs[0]
    k_unpack, k_index = _unpack(keys, "keys")
    v_unpack, v_index = _unpack(reader.inputs[1], "values")
    separate = produced_by(tensor, "Transpose")
    q_unpack, q_index = (separate, 0) if separate is not None else _unpack(tensor, "queries")
    if k_unpack is not v_unpack or (separate is None and q_unpack is not k_unpack):
        raise MatchFailure(label(k_unpack), "expected keys and values (and packed queries) from one projection")
    order = (k_index, v_index) if separate is not None else (q_index, k_index, v_index)
    if order != tuple(range(len(order))):
        raise MatchFailure(label(k_unpack), f"expected queries, keys and values packed in this order, found {order}")
    _perm(k_unpack, [2, 0, 3, 1, 4], "the packed projection")
    kv_reshape = producer(k_unpack.inputs[0], ["Reshape"], "the packed projection split into heads")
    heads, head_dim = _heads(kv_reshape, len(order))
    keys_values = match_linear(kv_reshape.inputs[0], "the packed projection")
    queries, q_reshape = keys_values, kv_reshape
    if separate is not None:
        _perm(separate, [0, 2, 1, 3], "the query projection")
        q_reshape = producer(separate.inputs[0], ["Reshape"], "the query projection split into heads")
        if _heads(q_reshape, None) != (heads, head_dim):
            raise MatchFailure(label(q_reshape), f"expected {heads} heads of width {head_dim}")
        queries = match_linear(q_reshape.inputs[0], "the query projection")
        cut = producer(queries.source, ["Slice", "Gather"], "the queried rows")
    norm = producer(keys_values.source, ["LayerNormalization"], "the norm before the attention")
    if separate is not None and cut is not None and cut.inputs[0] is not norm.outputs[0]:
        raise MatchFailure(label(cut), "expected the queried rows to be taken from the norm before the attention")
    if keys_values.weight.shape[1] != len(order) * heads * head_dim:
        raise MatchFailure(label(keys_values.matmul), f"expected {len(order)} x {heads} x {head_dim} outputs")
    out_reshape, residual, shortcut = _forward(reader)
    return Attention(
        softmax=softmax, norm=norm, queries=queries, keys_values=keys_values, q_reshape=q_reshape, kv_reshape=kv_reshape,
        out_reshape=out_reshape, unpacked_q=tensor, scale=scale, q_norm=q_norm, cut=cut, heads=heads, head_dim=head_dim,
        residual=residual, shortcut=shortcut,
    )  # fmt: skip


def _takes_entry(node: gs.Node) -> bool:
    """Whether a Gather takes one entry of the packed projection's leading axis, rather than rows."""
    return bool(node.op == "Gather" and node.attrs.get("axis", 0) == 0)


def _forward(mix: gs.Node) -> tuple[gs.Node, gs.Node, gs.Tensor]:
    """``(Reshape that merges the heads, residual Add, its shortcut operand)`` after the product with the values."""
    swap = only_consumer(mix.outputs[0], "the Transpose that brings the heads together")
    if swap.op != "Transpose":
        raise MatchFailure(label(swap), "expected the Transpose that brings the heads together")
    _perm(swap, [0, 2, 1, 3], "the heads brought together")
    reshape = only_consumer(swap.outputs[0], "the Reshape that merges the heads")
    shape = integers(reshape.inputs[1]) if reshape.op == "Reshape" else None
    if shape is None or len(shape) != 3:
        raise MatchFailure(label(reshape), "expected a Reshape to a constant [batch, tokens, width]")
    tensor = reshape.outputs[0]
    while True:
        node = only_consumer(tensor, "the output projection or the shortcut's Add")
        if node.op == "Add" and operands(node) is None:
            other = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
            return reshape, node, other
        if len(node.inputs) == 2 and operands(node) is None:
            raise MatchFailure(label(node), "expected the output projection to have one computed input")
        ensure_tokenwise(node, "the output projection")
        tensor = node.outputs[0]


def ensure_tokenwise(node: gs.Node, what: str) -> None:
    """Raise ``MatchFailure`` unless ``node`` treats every token by itself, so that dropping rows before it is exact."""
    if node.op == "LayerNormalization":
        if node.attrs.get("axis", -1) in (-1, 2):
            return
    elif node.op in ("Split", "Slice"):  # a gated MLP takes its halves of the width
        bounds = read_slice(node) if node.op == "Slice" else (node.attrs.get("axis", 0),)
        if bounds is not None and bounds[0] in (-1, 2):
            return
    elif node.op in POINTWISE:
        parts = operands(node) if len(node.inputs) == 2 else None
        if node.op == "MatMul":
            if parts is not None and parts[1].ndim == 2 and parts[0] is node.inputs[0]:
                return
        elif parts is None or parts[1].ndim < 2 or parts[1].shape[-2] == 1:
            return
    raise MatchFailure(label(node), f"expected {what} to treat tokens one by one")
