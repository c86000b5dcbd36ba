"""Merges the tokens that a block drops into kept ones, as a plan says: with which weights, and where a graph allows it.

A kept token becomes the mean of all the original tokens that it then stands for: ``own`` times itself plus ``taken`` times the
dropped ones. This is done wherever the block's cut takes rows: of the residual stream for the shortcut, and of the block's
normed input for the queries and all else that only kept tokens need. A key that stands for c tokens gets log(c) added to its
logits, so that it weighs as much as c keys (proportional attention; Bolya et al., Token Merging, ICLR 2023).

The mean may be taken anywhere behind the norm as long as only affine maps that are the same for all tokens lie between,
because its weights add up to one. So each place where rows are taken is followed back to the stream; anything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.axes import Tokens, tokens_in
from graph_passes.analysis.axis_map import AxisMap
from graph_passes.analysis.operators import DATA_MOVEMENT_OPS, NORM_OPS
from graph_passes.analysis.patterns import MatchFailure, computed_and_constant, constant_value, label
from graph_passes.analysis.vit_structure import Structure
from graph_passes.node_builder import NodeBuilder, replace_input
from patchslim.plan import SlimPlan
from patchslim.token_groups import mixing_of

AFFINE_OPS = DATA_MOVEMENT_OPS | {"Add", "Sub", "Concat", "Dropout", "Neg"}
#: What exporters write a norm with, where it is not one node.
NORM_PART_OPS = {"Add", "Cast", "Div", "Identity", "Mul", "Pow", "ReduceMean", "ReduceSum", "Reciprocal", "Sqrt", "Sub"}
NORM_ROOT_OPS = NORM_OPS | {"Sqrt"}  # of these every norm has one


class Merges:
    """The merges of a plan; methods take tokens by their names in the graph."""

    def __init__(self, structure: Structure, plan: SlimPlan) -> None:
        self.plan = plan
        self.index = {name: number for number, name in enumerate(structure.names)}
        everything = list(range(plan.tokens))
        pairs = zip([everything, *plan.kept], [[1] * plan.tokens, *plan.sizes()], strict=True)
        self.sizes = [dict(zip(tokens, sizes, strict=True)) for tokens, sizes in pairs]  # by how many blocks were passed

    def at(self, block: int) -> bool:
        """Whether a block merges any token that it drops."""
        after = self.sizes[block + 1] if block < self.plan.depth else {}
        return any(size > self.sizes[block][token] for token, size in after.items())

    def weights(self, block: int, read: Sequence[int], kept: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The weights by which a block merges: ``own [k]`` of the tokens kept, ``taken [k, r]`` of those dropped.

        The dropped ones are in the order in which the block reads them. Only for a block that merges (``at``).
        """
        before, after = ([self.index[name] for name in names] for names in (read, kept))
        sizes = ([self.sizes[block][token] for token in before], [self.sizes[block + 1][token] for token in after])
        found = mixing_of(before, after, sizes, self.plan.merged_into or [])
        assert found is not None  # it merges
        return np.asarray(found[0]), np.asarray(found[1])

    def bias(self, block: int, read: Sequence[int]) -> NDArray[np.float64] | None:
        """For each token read, the logarithm of how many original tokens it stands for; None where each stands for itself."""
        sizes = [self.sizes[block][self.index[name]] for name in read]
        return np.asarray([math.log(size) for size in sizes]) if max(sizes) > 1 else None


def add_key_bias(graph: gs.Graph, softmax: gs.Node, bias: NDArray[np.float64], name: str) -> None:
    """Add ``bias [n]``, one number per key, to the logits that a Softmax reads.

    Where the logits are (batch, heads, queries, keys) it is laid (1, heads, 1, keys): OpenVINO 2026.4 fuses the attention, and
    in bfloat16 answers wrongly where its mask has fewer axes or one head for all.
    """
    logits = softmax.inputs[0]
    build = NodeBuilder(graph, name, logits.dtype)
    values = bias.astype(logits.dtype or np.float32)
    shape = list(logits.shape or [])
    if len(shape) == 4 and isinstance(shape[1], int):
        values = np.ascontiguousarray(np.broadcast_to(values, (1, shape[1], 1, len(values))))
    log_sizes = build.constant("log_sizes", values)
    replace_input(softmax, logits, build.op("Add", [logits, log_sizes]))


def merge_after_norm(axis_map: AxisMap, stream: set[int], merges: Merges, token_sets: dict[int, int]) -> None:
    """In blocks that merge, let the norm be computed of all tokens, and the queries picked out of a packed projection of all.

    ``stream``: the ``id`` of each tensor of the residual stream. ``token_sets``: the token set of each node by its ``id`` (see
    ``token_sets``), changed in place.
    """
    tables = {id(table.node) for table in axis_map.tables}
    normed = set(stream)  # the stream, and what is made of it without a linear layer
    for node in axis_map.nodes:
        level, token_set = axis_map.level(node.outputs[0]), token_sets.get(id(node))
        if token_set not in (2 * level, 2 * level + 1) or not merges.at(level):
            continue
        of_norm = node.op in NORM_OPS | NORM_PART_OPS and id(node) not in tables
        if of_norm and all(id(tensor) in normed for tensor in node.inputs if axis_map.depends(tensor)):
            normed |= {id(tensor) for tensor in node.outputs}
            token_sets[id(node)] = 2 * level
        elif node.op in ("Gather", "Slice", "Squeeze") and axis_map.tokens(node.inputs[0]) == axis_map.tokens(node.outputs[0]):
            maker = node.inputs[0].inputs[0] if node.inputs[0].inputs and id(node.inputs[0]) not in stream else node
            token_sets[id(node)] = min(token_set, token_sets.get(id(maker), token_set))


def ensure_mergeable(axis_map: AxisMap, taken: gs.Variable, stream: gs.Variable) -> None:
    """Raise ``MatchFailure`` unless ``taken`` is an affine map of ``stream`` or of its norm that is the same for all tokens."""
    tables = {id(table.node) for table in axis_map.tables}

    def is_affine(node: gs.Node) -> bool:
        return node.op in AFFINE_OPS or _is_scale(node) or _is_linear(node)

    for tensor, node in _back(axis_map, taken, stream, tables, is_affine):
        if not is_affine(node):
            _ensure_norm(axis_map, tensor, stream, tables)


def _back(
    axis_map: AxisMap, start: gs.Tensor, stream: gs.Variable, tables: set[int], through: Callable[[gs.Node], bool]
) -> Iterator[tuple[gs.Tensor, gs.Node]]:
    """What is computed between the stream and ``start``, each tensor with its node, as far back as ``through`` goes on."""
    pending, seen = [start], {id(stream)}
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or not axis_map.depends(tensor):
            continue
        seen.add(id(tensor))
        node = _node_before(axis_map, tensor, stream, tables)
        yield tensor, node
        if through(node):
            pending.extend(node.inputs)


def _node_before(axis_map: AxisMap, tensor: gs.Tensor, stream: gs.Variable, tables: set[int]) -> gs.Node:
    if not tensor.inputs:
        raise MatchFailure(f"tensor '{tensor.name}'", "expected it to be computed from the block's input, to merge its tokens")
    node = tensor.inputs[0]
    if id(node) in tables:
        raise MatchFailure(label(node), "expected the same for all tokens before some are merged; it has a row for each")
    if _held(axis_map, tensor) != _held(axis_map, stream):
        raise MatchFailure(label(node), "expected all tokens of the block's input together, to merge some of them")
    return node


def _held(axis_map: AxisMap, tensor: gs.Tensor) -> Tokens | None:
    axes = axis_map.of(tensor)
    return None if axes is None else tokens_in(axes)


def _is_scale(node: gs.Node) -> bool:
    """Whether a node multiplies by constants."""
    parts = computed_and_constant(node) if node.op in ("Mul", "Div") else None
    return parts is not None and (node.op == "Mul" or node.inputs[0] is parts[0])


def _is_linear(node: gs.Node) -> bool:
    """Whether a node is a linear layer, with one bias for all rows."""
    if node.op not in ("MatMul", "Gemm") or constant_value(node.inputs[1]) is None:
        return False
    if len(node.inputs) < 3:
        return True
    bias = constant_value(node.inputs[2])
    return bias is not None and bias.size in (1, *bias.shape[-1:])


def _ensure_norm(axis_map: AxisMap, normed: gs.Tensor, stream: gs.Variable, tables: set[int]) -> None:
    """Raise ``MatchFailure`` unless ``normed`` is the stream after one norm, as one node or written out."""
    last, roots = normed.inputs[0], 0
    for _, node in _back(axis_map, normed, stream, tables, lambda _: True):
        roots += node.op in NORM_ROOT_OPS
        if node.op not in NORM_PART_OPS | NORM_OPS or roots > 1:
            roots = 0
            break
    if roots != 1:
        raise MatchFailure(
            label(last), "expected linear layers and at most one norm, that of the block's input, before tokens are merged"
        )


def ensure_merged(structure: Structure, plan: SlimPlan) -> None:
    """Raise ``MatchFailure`` unless a graph that was cut to the plan's tokens merges the others as the plan says."""
    merges = Merges(structure, plan)
    for block in structure.blocks:
        read, kept = ([structure.names[token] for token in tokens] for tokens in (block.reads, block.computes))
        found = [mix for mix in structure.axis_map.mixing_matrices if mix.level == block.index]
        if not merges.at(block.index):
            if found:
                raise MatchFailure(label(found[0].node), "tokens are merged already, and the plan drops them without merging")
            continue
        if not found:
            raise MatchFailure(block.site, "already cut without merging; the plan merges the dropped tokens into kept ones")
        dropped, (own, taken) = tuple(name for name in read if name not in set(kept)), merges.weights(block.index, read, kept)
        every = np.zeros((len(kept), len(read)))
        every[:, [read.index(name) for name in dropped]] = taken
        every[range(len(kept)), [read.index(name) for name in kept]] = own
        for mix in found:
            names, wanted = (tuple(read), every) if mix.summed else (dropped, taken)
            same = mix.tokens.names == names and mix.matrix.shape == wanted.shape
            if not same or not np.allclose(mix.matrix, wanted, atol=1e-3):
                raise MatchFailure(label(mix.node), "tokens are merged already, but not as the plan says")
