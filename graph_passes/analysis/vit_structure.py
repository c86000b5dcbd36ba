"""Finds the parts of a Vision Transformer in an ONNX graph: what its blocks read and compute, and what its head reads.

``propagate_axes`` follows the tokens of the images and finds the attentions. A block lies between two places where everything
passes through one tensor, the residual stream. The names of nodes and tensors are never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graph_passes.analysis.axes import Gathered, Grid, Mixed, Tokens, axis_size, has, token_axis
from graph_passes.analysis.axis_map import Attention, AxisMap
from graph_passes.analysis.axis_propagation import propagate_axes
from graph_passes.analysis.foreign_operators import ensure_not_quantised, of_other_form
from graph_passes.analysis.operators import ELEMENTWISE_OPS, UNARY_OPS
from graph_passes.analysis.patterns import MatchFailure, constant_value, integers, label
from graph_passes.analysis.preprocessing import prepared_images
from graph_passes.onnx_io.graph_convert import sorted_nodes


@dataclass
class Block:
    """One block, from ``input`` to ``output`` of the residual stream.

    ``reads`` and ``computes``: its tokens by their index in a plan, in the order that they have in the graph.
    """

    index: int
    attentions: list[Attention]
    input: gs.Variable
    output: gs.Variable
    reads: list[int]
    computes: list[int]

    @property
    def site(self) -> str:
        """The block's name in messages."""
        return f"block {self.index}"


@dataclass
class Structure:
    """A Vision Transformer that was understood from images to head.

    ``images``: the graph's input, or what the graph itself makes ready of it. ``tokens``: how many there are, the
    ``prefix_tokens`` and one for each patch of the ``grid`` (rows, columns). ``width``: features of a token. ``stream[l]``: the
    residual stream behind l blocks. ``head_tokens``: plan indices of those that the head reads one by one. ``pools``: whether
    it also takes a mean or an attention over all that are left. ``names``: for each plan index the token's name in
    ``axis_map``.
    """

    axis_map: AxisMap
    images: gs.Variable
    tokens: int
    width: int
    grid: tuple[int, int]
    prefix_tokens: int
    stream: list[gs.Variable]
    blocks: list[Block]
    head_tokens: list[int]
    pools: bool
    names: list[int]

    @property
    def order(self) -> list[int]:
        """Plan indices of the tokens as they enter the first block."""
        return self.indices(self.axis_map.tokens(self.stream[0]))

    def indices(self, tokens: Tokens | None) -> list[int]:
        """Plan indices of tokens, in their order."""
        index = {name: number for number, name in enumerate(self.names)}
        return [index[name] for name in (tokens.names if tokens is not None else ())]


def find_structure(graph: gs.Graph) -> Structure:
    """Find the Vision Transformer in ``graph``, whose shapes must be inferred and constants folded.

    Raises ``MatchFailure`` naming the node at which it is not one, or not of a form that the passes understand.
    """
    ensure_not_quantised(graph)
    if not any(_weighs_values(node) for node in graph.nodes):
        raise of_other_form(graph) or MatchFailure(
            "graph", "expected a Vision Transformer; found no Softmax that weighs values, so no attention"
        )
    nodes = sorted_nodes(graph)
    images = prepared_images(nodes, _images(graph))
    axis_map = propagate_axes(nodes, images)
    for output in graph.outputs:
        if id(output) in axis_map.faults:
            raise axis_map.faults[id(output)]
        tokens = axis_map.tokens(output)
        if any(has(axis, Mixed, Gathered) for axis in axis_map.of(output) or ()):
            raise MatchFailure(f"graph output '{output.name}'", "expected no tokens that a constant matrix mixes")
        if tokens is not None and tokens.size > 1:
            expected = f"expected the head's answer, not {tokens.size} tokens; choose other outputs with --outputs"
            raise MatchFailure(f"graph output '{output.name}'", expected)
    levels = _levels(axis_map)
    if not levels:
        raise MatchFailure("graph", "expected a Vision Transformer; found no attention among patches of the image")
    stream = _stream(graph, nodes, axis_map, len(levels))
    first = axis_map.of(stream[0])
    assert first is not None
    place = token_axis(first)
    width = max(axis_size(axis) for index, axis in enumerate(first) if index != place and all(isinstance(f, int) for f in axis))
    grid = _grid(axis_map)
    names = _names(axis_map, stream[0], grid)
    head, pools = _head(graph, nodes, axis_map, len(levels))
    structure = Structure(
        axis_map=axis_map, images=images, tokens=len(names), width=width, grid=grid, stream=stream, blocks=[], head_tokens=[],
        prefix_tokens=sum(name < 0 for name in names), pools=pools, names=names,
    )  # fmt: skip
    entering = axis_map.tokens(stream[0])
    if entering is None or not head | set(entering.names) <= set(names):
        expected = f"expected one token per patch of a {grid} grid, and prefix tokens"
        raise MatchFailure(label(stream[0].inputs[0]), expected)
    structure.head_tokens = sorted(structure.indices(Tokens(tuple(head))))
    for index, attentions in enumerate(levels):
        reads, computes = {a.read.names for a in attentions}, {a.queried.names for a in attentions if a.queried is not None}
        if len(reads) != 1 or len(computes) != 1:
            raise MatchFailure(f"block {index}", "expected all its attentions to read and compute the same tokens")
        read, computed = (structure.indices(Tokens(next(iter(found)))) for found in (reads, computes))
        structure.blocks.append(Block(index, attentions, stream[index], stream[index + 1], read, computed))
    return structure


def _weighs_values(node: gs.Node) -> bool:
    """Whether a node is an attention's: a Softmax that goes into a product with something computed, not a classifier's own."""
    if node.op != "Softmax":
        return bool(node.op == "Attention")
    pending, seen = [node.outputs[0]], set()
    while pending:
        tensor = pending.pop()
        for reader in tensor.outputs:
            if reader.op == "MatMul" and constant_value(reader.inputs[1]) is None:
                return True
            if reader.op in UNARY_OPS | ELEMENTWISE_OPS and id(reader) not in seen:
                seen.add(id(reader))
                pending.extend(reader.outputs)
    return False


def _images(graph: gs.Graph) -> gs.Variable:
    inputs = [tensor for tensor in graph.inputs if tensor.outputs]
    if len(inputs) != 1:
        names = ", ".join(f"'{tensor.name}'" for tensor in inputs) or "none"
        raise MatchFailure("graph", f"expected images as the one input that is read; found {names}")
    return inputs[0]


def _levels(axis_map: AxisMap) -> list[list[Attention]]:
    """The attentions among tokens by how many attentions came before them."""
    among = [attention for attention in axis_map.attentions if attention.queried is not None]
    levels = sorted({attention.level for attention in among})
    if levels != list(range(len(levels))):
        raise MatchFailure(label(among[0].mix), "expected the attentions one behind the other")
    return [[attention for attention in among if attention.level == level] for level in levels]


def _stream(graph: gs.Graph, nodes: list[gs.Node], axis_map: AxisMap, depth: int) -> list[gs.Variable]:
    """For every number of attentions passed the tensor that all tokens pass through before the next one."""
    found: dict[int, list[gs.Variable]] = {}
    live: dict[int, int] = {}
    ends = {id(tensor) for tensor in graph.outputs}
    for node in nodes:
        for tensor in {id(tensor): tensor for tensor in node.inputs}.values():
            if id(tensor) in live:
                live[id(tensor)] -= 1
                if not live[id(tensor)]:
                    del live[id(tensor)]
        for tensor in node.outputs:
            readers = {id(reader) for reader in tensor.outputs if reader.op not in ("Shape", "Size")}
            if axis_map.depends(tensor) and (readers or id(tensor) in ends):
                live[id(tensor)] = len(readers) + (id(tensor) in ends)
        for tensor in node.outputs:
            axes = axis_map.of(tensor)
            if list(live) == [id(tensor)] and axes is not None and token_axis(axes) is not None:
                found.setdefault(axis_map.level(tensor), []).append(tensor)
    for level in range(depth + 1):
        if level not in found:
            raise MatchFailure(f"block {level}", "expected all tokens to pass through one tensor before it")
    closing = [tensor for tensor in found[depth] if _joins(axis_map, tensor.inputs[0])]
    return [*(found[level][-1] for level in range(depth)), (closing or found[depth])[-1]]


def _joins(axis_map: AxisMap, node: gs.Node) -> bool:
    """Whether a node closes a shortcut: it adds tokens to tokens."""
    return bool(node.op == "Add" and all(axis_map.tokens(tensor) is not None for tensor in node.inputs))


def _names(axis_map: AxisMap, first: gs.Variable, grid: tuple[int, int]) -> list[int]:
    """The name of each token in a plan's order: prefix tokens as they were before any reordering, then patches row by row.

    Patches that ``drop_patches`` left out have names as well, so that a plan's numbers hold.
    """
    source = first
    while (node := source.inputs[0]).op in ("Gather", "Slice", "MatMul", "Concat"):
        before = [tensor for tensor in node.inputs if axis_map.tokens(tensor) is not None]
        if not before or {axis_map.tokens(tensor) for tensor in before} == {axis_map.tokens(source)}:
            break
        if node.op == "Concat" and any(axis_map.of(tensor) is None for tensor in node.inputs):
            break  # prefix tokens are joined here
        source = _source_of_runs(before)
    tokens = axis_map.tokens(source)
    assert tokens is not None
    return [*(name for name in tokens.names if name < 0), *range(grid[0] * grid[1])]


def _source_of_runs(tensors: list[gs.Variable]) -> gs.Variable:
    """The tensor that a Concat's parts were taken from, or the only tensor there is."""
    node = tensors[0].inputs[0] if tensors[0].inputs else None
    return node.inputs[0] if len(tensors) > 1 and node is not None and node.op == "Slice" else tensors[0]


def _grid(axis_map: AxisMap) -> tuple[int, int]:
    factors = [factor for axes in axis_map.axes.values() for axis in axes for factor in axis]
    sizes = {factor.axis: factor.size for factor in factors if isinstance(factor, Grid)}
    return sizes.get(0, 1), sizes.get(1, 1)


def _head(graph: gs.Graph, nodes: list[gs.Node], axis_map: AxisMap, depth: int) -> tuple[set[int], bool]:
    """Names of the tokens that are read one by one, and whether all that are left are pooled."""
    single: set[int] = set()
    pools = False
    pooling = {id(attention.mix) for attention in axis_map.attentions if attention.queried is None}
    for node in nodes:
        sources = [tensor for tensor in node.inputs if axis_map.tokens(tensor) is not None]
        onwards = any(id(tensor) in axis_map.faults or _holds_tokens(axis_map, tensor) for tensor in node.outputs)
        if not sources or onwards or node.op in ("Shape", "Size"):
            continue
        for tensor in sources:
            if axis_map.level(tensor) != depth:
                raise MatchFailure(label(node), "expected only what is behind the last block to read single tokens")
            tokens = axis_map.tokens(tensor)
            assert tokens is not None
            if id(node) in pooling or node.op == "ReduceMean":
                pools = True
            elif node.op == "Gather":
                (row,) = _indices(node)
                single.add(tokens.names[row])
            else:
                single.update(tokens.names)
    for output in graph.outputs:
        tokens = axis_map.tokens(output)
        single.update(tokens.names if tokens is not None else ())
    return single, pools


def _indices(node: gs.Node) -> list[int]:
    return integers(node.inputs[1]) or [0]


def _holds_tokens(axis_map: AxisMap, tensor: gs.Tensor) -> bool:
    axes = axis_map.of(tensor)
    return axes is not None and any(has(axis, Tokens, Mixed, Gathered) for axis in axes)
