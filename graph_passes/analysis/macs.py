"""Counts the multiply-accumulates (MACs) of a graph for one image: before its blocks, in each block, and behind them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

import onnx_graphsurgeon as gs

from graph_passes.analysis.axes import Axes, Batch, axis_size
from graph_passes.analysis.axis_map import Attention, AxisMap
from graph_passes.analysis.linear_layers import column_numbers, projection_outputs
from graph_passes.analysis.patterns import MatchFailure
from graph_passes.analysis.vit_structure import Structure
from patchslim.macs import Geometry


@dataclass(frozen=True)
class GraphMacs:
    """MACs of one image; biases, norms and taking rows count as none. ``stem``: before the blocks; ``head``: behind them."""

    stem: int
    blocks: list[int]
    head: int

    @property
    def total(self) -> int:
        """MACs of the whole graph."""
        return self.stem + sum(self.blocks) + self.head

    def as_dict(self) -> dict[str, object]:
        """The counts as plain values, for a report."""
        return asdict(self) | {"total": self.total}


def macs_of_graph(structure: Structure) -> GraphMacs:
    """The MACs of a graph as it is, dense or cut."""
    parts = [sum(node_macs(structure.axis_map, node) for node in nodes) for nodes in regions(structure)]
    return GraphMacs(parts[0], parts[1:-1], parts[-1])


def regions(structure: Structure) -> list[list[gs.Node]]:
    """The nodes before the blocks, of each block, and behind them."""
    nodes = structure.axis_map.nodes
    place = {id(node): index for index, node in enumerate(nodes)}
    ends = [place[id(tensor.inputs[0])] + 1 for tensor in structure.stream]
    return [nodes[start:end] for start, end in zip([0, *ends], [*ends, len(nodes)], strict=True)]


def node_macs(axis_map: AxisMap, node: gs.Node) -> int:
    """MACs of one node for one image; 0 for a node that multiplies no matrices, or only takes rows."""
    if node.op not in ("MatMul", "Gemm", "Conv", "Attention") or not any(axis_map.depends(tensor) for tensor in node.inputs):
        return 0
    result, first = axis_map.of(node.outputs[0]), axis_map.of(node.inputs[0])
    if result is None:
        return 0
    if node.op == "Conv":
        weights = node.inputs[1].shape or []
        return _elements(result) * prod(int(length) for length in weights[1:])
    if node.op == "Attention":
        keys = axis_map.of(node.inputs[1])
        return 0 if keys is None else 2 * _elements(result) * axis_size(keys[-2])
    if first is None:  # constant queries of an attention pool; a one-hot matrix is no arithmetic
        second = axis_map.of(node.inputs[1])
        chooses = (
            second is not None and axis_map.tokens(node.inputs[1]) is not None and axis_map.tokens(node.outputs[0]) is not None
        )
        return 0 if second is None or chooses else _elements(result) * axis_size(second[-2])
    return _elements(result) * axis_size(first[-1])


def _elements(axes: Axes) -> int:
    """Elements of a tensor for one image."""
    return prod(axis_size(tuple(factor for factor in axis if not isinstance(factor, Batch))) for axis in axes)


def geometry_of(structure: Structure) -> Geometry:
    """The sizes by which a plan counts its MACs, of a dense graph.

    Raises ``MatchFailure`` where a block is cut already, or blocks differ in their MACs.
    """
    axis_map, tokens, width = structure.axis_map, structure.tokens, structure.width
    stem, *blocks, head = regions(structure)
    totals = {sum(node_macs(axis_map, node) for node in nodes) for nodes in blocks}
    if len(totals) != 1 or any(len(block.computes) != tokens for block in structure.blocks):
        raise MatchFailure("graph", f"expected blocks of equal cost, none of them cut; they take {sorted(totals)} MACs")
    first = structure.blocks[0]
    attention = sum(
        node_macs(axis_map, node) for a in first.attentions for node in {id(a.scores): a.scores, id(a.mix): a.mix}.values()
    )
    queries = attention // (2 * tokens * tokens)
    mlp = (totals.pop() - attention) // tokens - 4 * width * queries
    hidden = max(1, mlp // (2 * width))
    reading = [node for node in head if any(axis_map.tokens(tensor) is not None for tensor in node.inputs)]
    pooled = sum(node_macs(axis_map, node) for node in reading) if structure.pools else 0
    pool_tokens = tokens if pooled else 0
    packings = [_packing(axis_map, attention) for attention in first.attentions]
    return Geometry(
        embed_dim=width,
        mlp_hidden_dim=hidden,
        patch_macs=sum(node_macs(axis_map, node) for node in stem),
        head_macs=sum(node_macs(axis_map, node) for node in head) - pooled,
        attn_dim=None if queries == width else queries,
        mlp_macs=None if mlp == 2 * width * hidden else max(1, mlp),
        packed_qkv=all(elsewhere is not None for elsewhere in packings),
        packed_mlp_dim=sum(elsewhere or 0 for elsewhere in packings),
        pool_macs=pooled // tokens if pooled else 0,
        pool_tokens=pool_tokens,
    )


def _packing(axis_map: AxisMap, attention: Attention) -> int | None:
    """How many columns of the projection of queries and keys go elsewhere; None where they have projections of their own."""
    leaves = [projection_outputs(axis_map, operand) for operand in (attention.queries, attention.keys, attention.values)]
    products = [{id(leaf.linear.product) for leaf in found} for found in leaves]
    if not all(products) or not products[0] & (products[1] | products[2]):
        return None
    taken = column_numbers([leaf for found in leaves for leaf in found])
    return int(leaves[0][0].linear.weight.shape[1]) - len(taken)
