"""Which tokens each node of a graph computes once its blocks are laid out for other tokens.

Token sets are numbered as the data flows: ``2 l`` is what the residual stream holds behind l blocks, ``2 l + 1`` what block l
(from 0) computes. ``2 l + 1`` and ``2 l + 2`` differ in mode ``stale`` only, where dropped rows are put back.

One walk from the head to the images asks at every tensor how much of it is needed. An attention asks for the keys and values of
all tokens that its block reads, everything else only for what its own readers ask; where both meet, the larger set is
computed, and the smaller one is cut out of it. So a cut comes to lie wherever queries and shortcut leave the tokens that
keys and values need, whatever the exporter made of the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graph_passes.analysis.axes import Axes, Tokens, has
from graph_passes.analysis.vit_structure import Structure
from graph_passes.cutting.token_merging import Merges

#: The token set of what comes before the blocks: all tokens, as they are.
STEM = -1


class TokenLayout:
    """Tokens by plan index: ``read[l]`` those of the stream behind l blocks, ``computed[l]`` those that block l computes.

    ``merges`` says which tokens the others are merged into; None: they are dropped. ``sets`` has the tokens by their names in
    the graph, for each token set.
    """

    def __init__(
        self,
        structure: Structure,
        read: Sequence[Sequence[int]],
        computed: Sequence[Sequence[int]],
        merges: Merges | None = None,
    ) -> None:
        self.merges = merges
        name = structure.names
        self.sets = {2 * level: [name[token] for token in tokens] for level, tokens in enumerate(read)}
        self.sets |= {2 * level + 1: [name[token] for token in tokens] for level, tokens in enumerate(computed)}


class TokenSets:
    """The token set of every node of ``graph`` under ``layout``, by the node's ``id`` in ``of_node``."""

    def __init__(self, graph: gs.Graph, structure: Structure, layout: TokenLayout) -> None:
        self.axis_map, self.names = structure.axis_map, layout.sets
        self.stream = {id(tensor): level for level, tensor in enumerate(structure.stream)}
        self.of_node: dict[int, int] = {}
        self._assign(graph, last=2 * len(structure.blocks))

    def _assign(self, graph: gs.Graph, last: int) -> None:
        asked: dict[int, int] = {id(tensor): last for tensor in graph.outputs}
        keys_values = {(id(node), operand) for a in self.axis_map.attentions for node, operand in (a.keys, a.values)}
        for node in reversed(self.axis_map.nodes):
            if not any(self.axis_map.depends(tensor) for tensor in node.inputs) or node.op in ("Shape", "Size"):
                continue
            level = next((self.stream[id(tensor)] for tensor in node.outputs if id(tensor) in self.stream), None)
            wanted = [asked[id(tensor)] for tensor in node.outputs if id(tensor) in asked]
            if not wanted:
                continue  # nothing reads it
            token_set = min(wanted) if level is None else 2 * level - 1
            if all(self.axes(tensor) is None for tensor in node.outputs) and level is None:
                token_set = last  # the head: its outputs hold no tokens
            self.of_node[id(node)] = token_set
            for operand, tensor in enumerate(node.inputs):
                if self.axis_map.depends(tensor):
                    whole = (id(node), operand) in keys_values and token_set != STEM
                    needed = 2 * self.axis_map.level(tensor) if whole else token_set
                    asked[id(tensor)] = min(needed, asked.get(id(tensor), needed))

    def axes(self, tensor: gs.Tensor) -> Axes | None:
        """The axes of a tensor that holds tokens, on whatever axis; None for one that holds none."""
        axes = self.axis_map.of(tensor)
        return axes if axes is not None and any(has(axis, Tokens) for axis in axes) else None

    def within(self, tokens: Tokens, token_set: int, level: int) -> tuple[int, ...]:
        """Those of ``tokens`` that a token set has; of keys, those that the block behind ``level`` blocks reads."""
        names = self.names[2 * level if tokens.keys else token_set] if token_set != STEM else tokens.names
        there = set(tokens.names)
        return tuple(name for name in names if name in there)

    def held_by(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """The tokens that ``tensor`` will hold."""
        tokens = self.axis_map.tokens(tensor)
        assert tokens is not None
        if id(tensor) in self.stream:
            return self.within(tokens, 2 * self.stream[id(tensor)], 0)
        token_set = self.of_node.get(id(tensor.inputs[0]), STEM) if tensor.inputs else STEM
        return self.within(tokens, token_set, 0)
