"""Lays a graph's blocks out for other tokens: which each block reads, and which it computes.

``token_sets`` says which tokens each node is to compute. Rows are taken wherever a node reads fewer tokens than there are, and
every constant that has one row per token, or names their number, is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.analysis.axes import UNKNOWN_BATCH, Axis, Tokens, axis_size, has, token_axis
from graph_passes.analysis.axis_map import Attention, TokenTable
from graph_passes.analysis.patterns import MatchFailure, constant_value, integers, label
from graph_passes.analysis.vit_structure import Structure
from graph_passes.cutting.row_ops import RowAxis, merge_rows, sum_rows, take_rows
from graph_passes.cutting.token_merging import add_key_bias, ensure_mergeable, merge_after_norm
from graph_passes.cutting.token_sets import STEM, TokenLayout, TokenSets
from graph_passes.node_builder import NodeBuilder, make_constant, replace_all_uses
from graph_passes.pass_registry import CutForm, MergeForm

_TOKEN_SELECTING_OPS = {"Slice", "Gather", "Split", "Concat"}


def apply_layout(
    graph: gs.Graph, structure: Structure, layout: TokenLayout, form: CutForm = "auto", merge: MergeForm = "matrix"
) -> None:
    """Change ``graph`` so that its blocks read and compute the tokens of ``layout``.

    Every cut has the form ``form``, every merge of tokens the form ``merge``.

    Raises ``MatchFailure`` where the graph merges tokens already, or where rows cannot be taken.
    """
    if mixing := structure.axis_map.mixing_matrices:
        raise MatchFailure(label(mixing[0].node), "expected no tokens to be mixed yet; this matrix mixes them")
    _Cutter(graph, structure, layout, form, merge).run()


class _Cutter:
    def __init__(self, graph: gs.Graph, structure: Structure, layout: TokenLayout, form: CutForm, merge: MergeForm) -> None:
        self.graph, self.structure, self.axis_map = graph, structure, structure.axis_map
        self.form, self.merge = form, merge
        self.sets, self.merges = TokenSets(graph, structure, layout), layout.merges
        self.taken: dict[tuple[int, tuple[int, ...]], gs.Variable] = {}
        self.outputs: dict[int, gs.Variable] = {}  # the stream with its dropped rows put back
        self.tables: dict[int, list[TokenTable]] = {}
        for table in self.axis_map.tables:
            self.tables.setdefault(id(table.node), []).append(table)

    def run(self) -> None:
        if self.merges is not None:
            merge_after_norm(self.axis_map, set(self.sets.stream), self.merges, self.sets.of_node)
        originals = [node for node in self.axis_map.nodes if self.sets.of_node.get(id(node), STEM) != STEM]
        for tensor in self.structure.stream:
            self._put_back(tensor)
        for node in originals:
            self._rewire(node)
        for attention in self.axis_map.attentions:
            self._weigh_keys(attention)

    def _put_back(self, tensor: gs.Variable) -> None:
        """Order the tokens that enter the first block; in mode ``stale``, put a block's dropped rows behind the others."""
        level = self.sets.stream[id(tensor)]
        tokens, readers = self.axis_map.tokens(tensor), list(tensor.outputs)
        if not readers or tokens is None:
            return
        have = tokens.names if level == 0 else self.sets.within(tokens, 2 * level - 1, 0)
        want = self.sets.within(tokens, 2 * level, 0)
        if have == want:
            return
        if level == 0:
            out = self._take(tensor, have, want, "token_order")
        else:
            before = self.outputs.get(level - 1, self.structure.stream[level - 1])
            place = self._place(tensor)
            rest = tuple(name for name in want if name not in set(have))
            dropped = self._take(
                before, self.sets.held_by(self.structure.stream[level - 1]), rest, f"block_{level - 1}.dropped"
            )
            build = NodeBuilder(self.graph, f"block_{level - 1}.write_back", tensor.dtype)
            out = build.op("Concat", [tensor, dropped], {"axis": place})
        self.outputs[level] = out
        replace_all_uses(tensor, out, readers)

    def _rewire(self, node: gs.Node) -> None:
        """Give a node the part of each operand that it is to read, and constants that fit."""
        token_set = self.sets.of_node[id(node)]
        level = max(self.axis_map.level(tensor) for tensor in node.inputs)
        keys_values = {operand for a in self.axis_map.attentions for at, operand in (a.keys, a.values) if at is node}
        sources = {index: self._source(tensor) for index, tensor in enumerate(node.inputs)}
        for index, source in sources.items():
            tokens = None if source is None else self.axis_map.tokens(source)
            if source is None or tokens is None:
                continue
            want = self.sets.within(tokens, 2 * self.axis_map.level(source) if index in keys_values else token_set, 0)
            have = self.sets.held_by(source)
            if want and want != have:
                node.inputs[index] = self._take(node.inputs[index], have, want, self._cut_name(node, index, source))
        if node.op in _TOKEN_SELECTING_OPS:
            self._move(node, list(sources.values()), token_set)
        for table in self.tables.get(id(node), []):
            self._cut_table(table, token_set, level)
        if node.op in ("Reshape", "Expand"):
            self._reshape(node, token_set, level)

    def _source(self, tensor: gs.Tensor) -> gs.Variable | None:
        """The tensor that ``axis_map`` knows of what a node reads; None for constants."""
        for level, out in self.outputs.items():
            if tensor is out:
                return self.structure.stream[level]
        return tensor if self.axis_map.of(tensor) is not None else None

    def _cut_name(self, node: gs.Node, index: int, source: gs.Variable) -> str:
        block = self.axis_map.level(source)
        if id(source) in self.sets.stream:
            return f"block_{block}.shortcut"
        scores = any(a.scores is node and index == 0 for a in self.axis_map.attentions)
        return f"block_{block}.{'queries' if scores else 'kept'}"

    def _take(self, tensor: gs.Tensor, have: Sequence[int], want: tuple[int, ...], name: str) -> gs.Variable:
        """The tokens ``want`` of a tensor that holds ``have``; taken once for all who ask."""
        key = (id(tensor), want)
        if key not in self.taken:
            source = self._source(tensor) or tensor
            place = {token: row for row, token in enumerate(have)}
            rows = [place[token] for token in want]
            axes = self.axis_map.of(source)
            assert axes is not None
            at, build = RowAxis(len(axes), self._place(source), len(have)), NodeBuilder(self.graph, name, tensor.dtype)
            level = self.axis_map.level(source)
            if self.merges is not None and self.merges.at(level) and len(have) != len(want):
                ensure_mergeable(self.axis_map, source, self.structure.stream[level])
                dropped = [place[token] for token in have if token not in set(want)]
                weights = self.merges.weights(level, have, want)
                if self.merge == "sum":
                    self.taken[key] = sum_rows(build, tensor, (rows, dropped), weights, at)
                else:
                    self.taken[key] = merge_rows(build, tensor, (rows, dropped), weights, at, self.form)
            else:
                self.taken[key] = take_rows(build, tensor, rows, at, self.form)
        return self.taken[key]

    def _weigh_keys(self, attention: Attention) -> None:
        """Let the keys of merged tokens weigh as much as all the tokens that they stand for."""
        if self.merges is None or attention.queried is None:
            return
        bias = self.merges.bias(attention.level, self.sets.within(attention.read, 2 * attention.level, 0))
        if bias is None:
            return
        if attention.softmax is None:
            raise MatchFailure(label(attention.mix), "expected a Softmax that merged tokens weigh in; expand_attention first")
        add_key_bias(self.graph, attention.softmax, bias, f"block_{attention.level}.sizes")

    def _place(self, tensor: gs.Tensor) -> int:
        axes = self.axis_map.of(tensor)
        place = None if axes is None else token_axis(axes)
        if place is None:
            raise MatchFailure(f"tensor '{tensor.name}'", "expected its tokens on an axis of their own, to cut them there")
        return place

    def _move(self, node: gs.Node, sources: list[gs.Variable | None], token_set: int) -> None:
        """Renumber a Slice, Gather, Split or Concat along the tokens."""
        first = next((source for source in sources if source is not None), None)
        axes = None if first is None else self.sets.axes(first)
        before = None if first is None else self.axis_map.tokens(first)
        after = self.axis_map.tokens(node.outputs[0])
        place = None if axes is None else token_axis(axes)
        if before is None or place is None or (node.op != "Concat" and before == after):
            return
        have = self.sets.within(before, token_set, 0)
        row = {token: number for number, token in enumerate(have)}
        if node.op == "Concat":
            if int(node.attrs["axis"]) % len(axes or ()) == place:
                self._concat(node, sources, token_set)
        elif after is None:  # a Gather of one token
            (index,) = integers(node.inputs[1]) or [0]
            node.inputs[1] = make_constant(f"{node.outputs[0].name}.row", np.asarray(row[before.names[index]], dtype=np.int64))
        elif node.op == "Split":
            parts = [self.sets.within(t, token_set, 0) for out in node.outputs if (t := self.axis_map.tokens(out)) is not None]
            if tuple(name for part in parts for name in part) != have:
                raise MatchFailure(label(node), "expected the tokens in an order that its parts keep")
            node.attrs.pop("num_outputs", None)
            sizes = make_constant(f"{node.outputs[0].name}.sizes", [len(part) for part in parts])
            node.inputs = [node.inputs[0], sizes]
        elif (part := self.sets.within(after, token_set, 0)) and part != have:
            rows = [row[name] for name in part]
            run = rows == list(range(rows[0], rows[0] + len(rows)))
            name = node.outputs[0].name
            node.op, node.attrs = ("Slice", {}) if run else ("Gather", {"axis": place})
            bounds = {"starts": [rows[0]], "ends": [rows[-1] + 1], "axes": [place]} if run else {"rows": rows}
            node.inputs = [node.inputs[0], *(make_constant(f"{name}.{key}", values) for key, values in bounds.items())]
        elif part:
            node.op, node.attrs = "Identity", {}
            node.inputs = [node.inputs[0]]

    def _concat(self, node: gs.Node, sources: list[gs.Variable | None], token_set: int) -> None:
        whole, place = self.axis_map.tokens(node.outputs[0]), int(node.attrs["axis"])
        assert whole is not None
        parts: list[tuple[int, ...]] = []
        left = iter(whole.names)
        for source, tensor in zip(sources, node.inputs, strict=True):
            tokens = None if source is None else self.axis_map.tokens(source)
            names = tuple(islice(left, tensor.shape[place] if tokens is None else tokens.size))
            parts.append(self.sets.within(Tokens(names), token_set, 0))
            if tokens is None and parts[-1] != names:
                raise MatchFailure(label(node), f"expected the constant tokens of '{tensor.name}' to be kept as they are")
        if tuple(name for part in parts for name in part) != self.sets.within(whole, token_set, 0):
            raise MatchFailure(label(node), "expected the tokens in an order that its parts keep")
        for index in reversed(range(len(parts))):
            if not parts[index]:
                del node.inputs[index]

    def _cut_table(self, table: TokenTable, token_set: int, level: int) -> None:
        want = self.sets.within(table.tokens, token_set, level)
        if want == table.tokens.names:
            return
        values = constant_value(table.node.inputs[table.operand])
        assert values is not None  # the axis_map saw to it
        row = {name: number for number, name in enumerate(table.tokens.names)}
        rows = [row[name] for name in want]
        name = f"{table.node.outputs[0].name}.operand_{table.operand}"
        table.node.inputs[table.operand] = make_constant(name, np.take(values, rows, axis=table.axis))

    def _reshape(self, node: gs.Node, token_set: int, level: int) -> None:
        """Give a shape that names a token count the new one, in a constant of its own: exporters share them among blocks."""
        axes, shape = self.sets.axes(node.outputs[0]), integers(node.inputs[1])
        if axes is None or shape is None:
            return
        wanted = list(shape)
        for index, axis in enumerate(axes[-len(shape) :]):
            if has(axis, Tokens) and shape[index] > 0:
                length = self._length(axis, token_set, level)
                wanted[index] = -1 if length >= UNKNOWN_BATCH else length
        if wanted.count(-1) > 1:
            raise MatchFailure(label(node), f"expected a shape {shape} that can say {wanted}")
        if wanted != shape:
            node.inputs[1] = make_constant(f"{node.outputs[0].name}.shape", wanted)

    def _length(self, axis: Axis, token_set: int, level: int) -> int:
        return axis_size(tuple(len(self.sets.within(f, token_set, level)) if isinstance(f, Tokens) else f for f in axis))
