"""Embed only those patches that the first block keeps or merges.

With ``cut_tokens`` alone the first block reads the keys and values of all tokens, so every patch is embedded. This pass is for
a plan whose first block drops many patches: they leave the graph, and with them their part of the patch embedding and of the
first keys and values. It changes the answer, so it runs only where it is named: the result is the plan's answer with those
patches masked in the first block too (in mode ``stale``, in every block).

Before: a convolution whose patches do not overlap; tokens neither ordered nor cut. It runs before ``order_tokens`` and
``cut_tokens``, and behind ``image_input`` where both are used. After: images -> [B, patches, pixels] by Reshape, Transpose and
Reshape; the kept patches, taken in the plan's order by one cut (``--cut``), so that ``order_tokens`` has nothing to do; times
the weights of the convolution, plus its bias. Constants with one row per token are cut. Site: the convolution.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.axes import Axes, Batch, Pixels, Tokens
from graph_passes.analysis.axis_map import AxisMap
from graph_passes.analysis.operators import SPATIAL_OPS
from graph_passes.analysis.patterns import MatchFailure, constant_value, integers, is_unpadded, label
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.cutting.plan_layout import embedded_tokens, ensure_plan_fits, uniform_layout
from graph_passes.cutting.token_cutter import apply_layout
from graph_passes.node_builder import NodeBuilder, replace_all_uses
from graph_passes.pass_registry import Settings, graph_pass

SHAPE_OPS = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"}


@graph_pass("drop_patches", default=False, needs_plan=True, after=("image_input",))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns 1 if patches were dropped, else 0. Raises ``MatchFailure`` and ``PlanMismatch``."""
    plan, structure = settings.require_plan(), find_structure(graph)
    ensure_plan_fits(structure, plan)
    embedded = set(embedded_tokens(plan))
    if set(structure.order) == embedded:
        return 0
    if len(structure.order) < plan.tokens:
        raise MatchFailure("block 0", "the patches of another plan were dropped already")
    if all(token < plan.prefix_tokens for token in embedded):
        raise MatchFailure("block 0", "the plan keeps no patch in the first block, and a graph must read its images")
    if any(len(block.computes) != plan.tokens for block in structure.blocks):
        raise MatchFailure("block 0", "blocks are cut already; drop_patches goes before cut_tokens")
    if structure.order != sorted(structure.order):
        raise MatchFailure(
            label(structure.stream[0].inputs[0]), "tokens are ordered already; drop_patches goes before order_tokens"
        )
    patches = _by_product(graph, structure.axis_map)
    structure = find_structure(graph)
    kept = uniform_layout(structure, [token for token in plan.order() if token in embedded])
    apply_layout(graph, replace(structure, stream=[patches, *structure.stream[1:]]), kept, settings.cut)
    return 1


def _by_product(graph: gs.Graph, axis_map: AxisMap) -> gs.Variable:
    """Embed patches by a MatMul in place of the convolution; returns ``[B, patches, pixels]``. Raises ``MatchFailure``."""
    conv = _convolution(axis_map)
    weights, bias = _constants(conv)
    rows, columns = _grid(axis_map, conv, weights)
    embedded = _embedded(axis_map, conv)
    (features, channels, height, width), source = weights.shape, conv.inputs[0]
    build = NodeBuilder(graph, conv.outputs[0].name, source.dtype)
    divided = build.constant("divided", [0, channels, rows, height, columns, width])
    joined = build.constant("joined", [0, rows * columns, channels * height * width])
    grid = build.op("Reshape", [source, divided], name="divide")
    by_place = build.op("Transpose", [grid], {"perm": [0, 2, 4, 1, 3, 5]}, name="by_place")
    patches = build.op("Reshape", [by_place, joined], name="patches")
    weight = build.constant("weight", weights.reshape(features, -1).T)
    tensor = build.op("MatMul", [patches, weight], name="matmul")
    if bias is not None:
        tensor = build.op("Add", [tensor, build.constant("bias", bias)], name="add")
    replace_all_uses(embedded, tensor)
    graph.cleanup()
    return patches


def _convolution(axis_map: AxisMap) -> gs.Node:
    """The one node that makes patches of the images' pixels."""
    spatial = [node for node in axis_map.nodes if node.op in SPATIAL_OPS and axis_map.depends(node.inputs[0])]
    if len(spatial) != 1 or spatial[0].op != "Conv":
        found = ", ".join(label(node) for node in spatial) or "none"
        site = label(spatial[0]) if spatial else "graph"
        raise MatchFailure(site, f"expected one convolution that makes patches of the images; found {found}")
    return spatial[0]


def _constants(conv: gs.Node) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """Weights ``[features, channels, height, width]`` and bias, of a convolution whose patches do not overlap."""
    weights = constant_value(conv.inputs[1])
    bias = constant_value(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if weights is None or weights.ndim != 4 or (len(conv.inputs) > 2 and bias is None):
        raise MatchFailure(label(conv), "expected constant weights [features, channels, height, width]")
    attrs, kernel = conv.attrs, list(weights.shape[2:])
    plain = attrs.get("group", 1) == 1 and all(step == 1 for step in attrs.get("dilations", [1]))
    if list(attrs.get("strides", [1, 1])) != kernel or not is_unpadded(conv) or not plain:
        raise MatchFailure(
            label(conv), f"expected patches side by side: a stride of {kernel}, as its kernel, no padding, dilation or groups"
        )
    return weights, bias


def _grid(axis_map: AxisMap, conv: gs.Node, weights: NDArray[np.generic]) -> tuple[int, int]:
    """Rows and columns of patches."""
    axes = axis_map.of(conv.inputs[0])
    sides = [] if axes is None else [axis[0] for axis in axes[2:] if len(axis) == 1]
    lengths = [side.size for number, side in enumerate(sides) if isinstance(side, Pixels) and side.axis == number]
    if len(lengths) != 2 or any(length % step for length, step in zip(lengths, weights.shape[2:], strict=True)):
        raise MatchFailure(label(conv), f"expected images of whole patches; they are {lengths}, patches {weights.shape[2:]}")
    return lengths[0] // weights.shape[2], lengths[1] // weights.shape[3]


def _embedded(axis_map: AxisMap, conv: gs.Node) -> gs.Variable:
    """The tensor ``[B, tokens, features]`` that the convolution's output becomes by moves alone."""
    tensor: gs.Variable = conv.outputs[0]
    while not _is_embedded(axis_map.of(tensor) or ()):
        readers = []
        for reader in list(tensor.outputs):
            if reader.op == "Shape":
                _read_batch_of(conv.inputs[0], reader)
            else:
                readers.append(reader)
        if len(readers) != 1 or readers[0].op not in SHAPE_OPS:
            raise MatchFailure(label(conv), "expected its output to be moved to [batch, tokens, features] and nothing else")
        tensor = readers[0].outputs[0]
    return tensor


def _is_embedded(axes: Axes) -> bool:
    kinds = [tuple(type(factor) for factor in axis) for axis in axes]
    return kinds == [(Batch,), (Tokens,), (int,)]


def _read_batch_of(images: gs.Tensor, shape: gs.Node) -> None:
    """Let a Shape node of which only the batch is read take it from the images."""
    first = shape.attrs.get("start", 0) == 0 and shape.attrs.get("end") == 1
    if not first and any(reader.op != "Gather" or integers(reader.inputs[1]) != [0] for reader in shape.outputs[0].outputs):
        raise MatchFailure(
            label(shape), "expected only the batch size to be read of the convolution's shape; fold_constants first"
        )
    shape.inputs[0] = images
