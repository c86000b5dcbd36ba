"""Finds where a graph has its images ready: what prepares them (bytes, Resize, Cast, normalisation) need not be understood."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.analysis.axis_propagation import propagate_axes
from graph_passes.analysis.patterns import MatchFailure

#: Where the first of these is, patches are being embedded.
_EMBEDDING_OPS = {"Conv", "MatMul", "Gemm", "Einsum", "Attention"}


def prepared_images(nodes: list[gs.Node], images: gs.Variable) -> gs.Variable:
    """The first tensor from which images can be followed to the embedding of their patches; ``images`` where none can.

    ``nodes`` are in topological order. Only tensors that all pixels pass through count.
    """
    ahead, ways = _before_embedding(nodes, images)
    for tensor in ways:
        try:
            axis_map = propagate_axes(ahead, tensor)
        except MatchFailure:
            continue
        if not axis_map.faults:
            return tensor
    return images


def nodes_before(tensor: gs.Variable) -> list[gs.Node]:
    """Every node that ``tensor`` is computed from."""
    found: dict[int, gs.Node] = {}
    pending = list(tensor.inputs)
    while pending:
        node = pending.pop()
        if id(node) not in found:
            found[id(node)] = node
            pending.extend(source for operand in node.inputs for source in operand.inputs)
    return list(found.values())


def _before_embedding(nodes: list[gs.Node], images: gs.Variable) -> tuple[list[gs.Node], list[gs.Variable]]:
    """The nodes on pixels before the first that embeds patches, and each tensor that all pixels pass through there."""
    ahead: list[gs.Node] = []
    ways = [images]
    live = {id(images): sum(reader.op not in ("Shape", "Size") for reader in images.outputs)}
    pixels = {id(images)}
    for node in nodes:
        read = [tensor for tensor in node.inputs if id(tensor) in pixels]
        if not read or node.op in ("Shape", "Size"):
            continue
        if node.op in _EMBEDDING_OPS:
            break
        ahead.append(node)
        for tensor in read:
            live[id(tensor)] -= 1
        for tensor in node.outputs:
            pixels.add(id(tensor))
            live[id(tensor)] = sum(reader.op not in ("Shape", "Size") for reader in tensor.outputs)
        left = [key for key, count in live.items() if count > 0]
        if len(left) == 1 and left[0] == id(node.outputs[0]):
            ways.append(node.outputs[0])
    return ahead, ways
