"""Finds the parts of a Vision Transformer in an ONNX graph by pattern: patch embedding, blocks, and what the head reads.

Anchors are the Softmaxes that weigh values and the Adds that close a shortcut; names are never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import onnx_graphsurgeon as gs

from graph_passes.attention import POINTWISE, Attention, back_over, ensure_tokenwise, is_attention, match_attention
from graph_passes.match import (
    MatchFailure,
    constant,
    label,
    only_consumer,
    operands,
    produced_by,
    producer,
    rows_taken,
    static_dim,
)


@dataclass
class Stem:
    """Patch embedding up to the first block: ``Conv -> [B, P, d] -> Concat with prefix tokens -> adds and norms``.

    ``positions`` are the Adds after the Concat whose constant has one row per token; ``gather`` is an ordering of the patches
    that is already there, ``order`` the original token index of every row.
    """

    concat: gs.Node
    patches: gs.Tensor
    gather: gs.Node | None
    positions: list[gs.Node]
    prefix_tokens: int
    grid: tuple[int, int]
    order: list[int]


@dataclass
class Block:
    """One transformer block: ``input [B, n, d]`` to ``updated [B, k, d]``, and to ``output`` where dropped rows are put back.

    ``shortcut_cut`` takes the kept rows of the input for the shortcut; ``write_back`` is the Concat of ``stale`` mode.
    """

    index: int
    input: gs.Tensor
    rows: int
    attention: Attention
    shortcut_cut: gs.Node | None
    updated: gs.Variable
    write_back: gs.Node | None

    @property
    def site(self) -> str:
        """The block as messages show it."""
        return f"block {self.index}"

    @property
    def output(self) -> gs.Variable:
        """What the next block reads."""
        return (self.write_back.outputs[0]) if self.write_back is not None else self.updated


@dataclass
class Structure:
    """A Vision Transformer that was understood from images to head."""

    tokens: int
    width: int
    stem: Stem
    blocks: list[Block]
    head_tokens: list[int]


def find_structure(graph: gs.Graph) -> Structure:
    """Read the Vision Transformer in ``graph`` (shapes inferred); raises ``MatchFailure`` with the node it fails at."""
    anchors = [node for node in graph.nodes if node.op == "Softmax" and is_attention(node)]
    if not anchors:
        raise MatchFailure("graph", "expected a Vision Transformer; found no Softmax that weighs values, so no attention")
    blocks: list[Block] = []
    for anchor in anchors:
        blocks.append(_match_block(len(blocks), match_attention(anchor)))
    for before, after in pairwise(blocks):
        if after.input is not before.output:
            raise MatchFailure(
                after.site, f"expected its input to be the output of {before.site}, tensor '{before.output.name}'"
            )
    first = blocks[0].input
    tokens, width = static_dim(first, 1, "token count"), static_dim(first, 2, "token width")
    stem = _match_stem(first, tokens)
    head_tokens, head = _match_head(blocks[-1].output)
    _ensure_only_head_is_read(graph, [stem.concat, *anchors], head)
    return Structure(tokens, width, stem, blocks, head_tokens)


def _match_block(index: int, attention: Attention) -> Block:
    """The block around an attention: its shortcut, its MLP and a write-back of dropped rows."""
    source = attention.norm.inputs[0]
    cut = None
    if attention.shortcut is not source:
        cut = producer(attention.shortcut, ["Slice", "Gather"], "the block's input, or kept rows of it, on the shortcut")
        if cut.inputs[0] is not source:
            raise MatchFailure(label(cut), f"expected kept rows of the block's input, tensor '{source.name}'")
    middle = attention.residual.outputs[0]
    closing = [node for node in middle.outputs if node.op == "Add" and operands(node) is None]
    if len(closing) != 1:
        raise MatchFailure(label(attention.residual), "expected one shortcut around the MLP after it")
    add = closing[0]
    _ensure_mlp(add.inputs[1] if add.inputs[0] is middle else add.inputs[0], middle, add)
    updated = add.outputs[0]
    write_back = None
    if cut is not None and len(updated.outputs) == 1 and updated.outputs[0].op == "Concat":
        write_back = updated.outputs[0]
        if write_back.attrs.get("axis") != 1 or len(write_back.inputs) != 2 or write_back.inputs[0] is not updated:
            raise MatchFailure(label(write_back), "expected the block's rows and then its dropped rows, on axis 1")
        rest = producer(write_back.inputs[1], ["Slice", "Gather"], "the dropped rows of the block's input")
        if rest.inputs[0] is not source:
            raise MatchFailure(label(rest), f"expected dropped rows of the block's input, tensor '{source.name}'")
    return Block(index, source, static_dim(source, 1, "token count"), attention, cut, updated, write_back)


def _ensure_mlp(tensor: gs.Tensor, start: gs.Tensor, add: gs.Node) -> None:
    """Raise unless everything between ``start`` and ``tensor`` treats tokens one by one."""
    pending, seen = [tensor], {id(start)}
    while pending:
        current = pending.pop()
        if id(current) in seen or constant(current) is not None:
            continue
        seen.add(id(current))
        if not current.inputs:
            raise MatchFailure(label(add), f"expected an MLP of the shortcut only; it also reads tensor '{current.name}'")
        ensure_tokenwise(current.inputs[0], "the MLP")
        pending.extend(current.inputs[0].inputs)


def _match_stem(tensor: gs.Tensor, tokens: int) -> Stem:
    """The patch embedding that computes the first block's input."""
    positions = []
    while (node := produced_by(tensor, "LayerNormalization", *POINTWISE)) is not None:
        parts = operands(node) if len(node.inputs) == 2 else None
        if node.op == "Add" and parts is not None and parts[1].ndim == 3 and parts[1].shape[1] == tokens > 1:
            positions.append(node)
        else:
            ensure_tokenwise(node, "the patch embedding")
        tensor = parts[0] if parts is not None else node.inputs[0]
    concat = producer(tensor, ["Concat"], "the Concat of prefix tokens and patches")
    if concat.attrs.get("axis") != 1:
        raise MatchFailure(label(concat), "expected prefix tokens and patches joined on axis 1")
    for prefix in concat.inputs[:-1]:
        if constant(back_over(prefix, "Expand", "Tile", *POINTWISE)) is None:
            raise MatchFailure(
                label(concat), f"expected constant prefix tokens before the patches; '{prefix.name}' is computed"
            )
    patches = concat.inputs[-1]
    gather = produced_by(patches, "Gather")
    if gather is not None:
        patches = gather.inputs[0]
    count = static_dim(patches, 1, "patch count")
    prefix_tokens = tokens - count
    conv = producer(
        back_over(patches, "Transpose", "Reshape", "Flatten", "LayerNormalization", "Add"), ["Conv"], "the patch embedding"
    )
    grid = static_dim(conv.outputs[0], 2, "patch grid"), static_dim(conv.outputs[0], 3, "patch grid")
    if grid[0] * grid[1] != count:
        raise MatchFailure(label(conv), f"expected a grid of {count} patches, found {grid[0]} x {grid[1]}")
    taken = list(range(count)) if gather is None else rows_taken(gather, 1, count)
    if taken is None or sorted(taken) != list(range(count)):
        raise MatchFailure(label(gather) if gather is not None else "patches", "expected an order of all patches on axis 1")
    order = [*range(prefix_tokens), *(prefix_tokens + t for t in taken)]
    return Stem(concat, patches, gather, positions, prefix_tokens, grid, order)


def _match_head(tensor: gs.Tensor) -> tuple[list[int], list[gs.Node]]:
    """Positions of the tokens that the head reads, and the nodes that take them, forward from the last block's output."""
    rows = static_dim(tensor, 1, "token count")
    while True:
        readers = list(tensor.outputs)
        taken = [rows_taken(node, 1, rows) if node.op in ("Gather", "Slice") else None for node in readers]
        if readers and None not in taken:
            return sorted({position for positions in taken if positions is not None for position in positions}), readers
        node = only_consumer(tensor, "the final norm or the head's choice of tokens")
        if node.op not in POINTWISE and node.op != "LayerNormalization":
            raise MatchFailure(label(node), "expected the head to take constant tokens (a Gather or Slice on axis 1)")
        ensure_tokenwise(node, "the final norm")
        tensor = node.outputs[0]


def _ensure_only_head_is_read(graph: gs.Graph, inner: list[gs.Node], head: list[gs.Node]) -> None:
    """Raise unless every graph output depends on tokens through the ``head`` nodes alone: others would change with a cut."""
    stop, forbidden = {id(node) for node in head}, {id(node) for node in inner}
    for output in graph.outputs:
        pending, seen = list(output.inputs), set(stop)
        while pending:
            node = pending.pop()
            if id(node) in forbidden:
                expected = f"expected it to read tokens by the head only, not by {label(node)}"
                raise MatchFailure(f"graph output '{output.name}'", expected)
            if id(node) not in seen:
                seen.add(id(node))
                pending.extend(source for tensor in node.inputs for source in tensor.inputs)
