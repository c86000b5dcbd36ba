"""Write each ``Attention`` node (opset 23) as scale, product, Softmax and product.

Engines fuse the plain form, and some do not know the operator: TensorRT fails to build it in FP32. Heads that are packed into
the width are unpacked first.

Before: Attention(q, k, v). After: (q * scale) k^T, (+ mask), Softmax, times v. Site: a node. A node with a cache, a causal
mask, a cap on its scores or fewer key heads than query heads stays as it is, and so does one that gives a graph output.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.analysis.patterns import MatchFailure, constant_value, label
from graph_passes.node_builder import NodeBuilder, replace_all_uses
from graph_passes.pass_registry import Settings, graph_pass


@graph_pass("expand_attention", after=("fold_constants",))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of nodes expanded."""
    outputs = {id(tensor) for tensor in graph.outputs}
    found = [node for node in graph.nodes if node.op == "Attention" and node.domain in (None, "", "ai.onnx")]
    nodes = [node for node in found if _is_plain(node) and id(node.outputs[0]) not in outputs]
    for node in nodes:
        _expand(graph, node)
    return len(nodes)


def _is_plain(node: gs.Node) -> bool:
    attrs = node.attrs
    cache = any(tensor.name for tensor in node.inputs[4:]) or any(tensor.outputs for tensor in node.outputs[1:])
    capped = attrs.get("softcap", 0.0) or attrs.get("is_causal", 0)
    mask = node.inputs[3] if len(node.inputs) > 3 and node.inputs[3].name else None
    return not (cache or capped or (mask is not None and constant_value(mask) is None)) and _heads(node) is not None


def _heads(node: gs.Node) -> int | None:
    """The number of heads, where queries, keys and values have the same."""
    if len(node.inputs[0].shape or []) == 4:
        heads = [tensor.shape[1] if tensor.shape and len(tensor.shape) == 4 else None for tensor in node.inputs[:3]]
    else:
        heads = [node.attrs.get("q_num_heads"), node.attrs.get("kv_num_heads"), node.attrs.get("kv_num_heads")]
    return int(heads[0]) if isinstance(heads[0], int) and heads[0] == heads[1] == heads[2] else None


def _expand(graph: gs.Graph, node: gs.Node) -> None:
    dtype = node.inputs[0].dtype
    build = NodeBuilder(graph, node.name or node.outputs[0].name, dtype)
    packed, heads = len(node.inputs[0].shape or []) == 3, _heads(node)
    parts = list(node.inputs[:3])
    if packed:
        for index, part in enumerate("qkv"):
            width = parts[index].shape[2]
            if not isinstance(width, int) or heads is None:
                raise MatchFailure(
                    label(node), f"expected queries, keys and values of a fixed width; one has the shape {parts[index].shape}"
                )
            shape = build.constant(f"{part}_shape", [0, 0, heads, width // heads])
            unpacked = build.op("Reshape", [parts[index], shape], name=f"{part}_reshape")
            parts[index] = build.op("Transpose", [unpacked], {"perm": [0, 2, 1, 3]}, name=f"{part}_heads")
    query, key, value = parts
    width = node.inputs[0].shape[-1] // (heads or 1) if packed else node.inputs[0].shape[-1]
    scale = node.attrs.get("scale") or 1 / math.sqrt(width)
    scaled = build.op("Mul", [query, build.constant("factor", np.asarray(scale, dtype=dtype))], name="scale")
    keys = build.op("Transpose", [key], {"perm": [0, 1, 3, 2]}, name="keys")
    scores = build.op("MatMul", [scaled, keys], name="scores")
    mask = constant_value(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3].name else None
    if mask is not None:
        if mask.dtype == np.bool_:
            mask = np.where(mask, 0, np.finfo(dtype).min).astype(dtype)
        scores = build.op("Add", [scores, build.constant("mask", mask)], name="masked")
    weights = build.op("Softmax", [scores], {"axis": -1}, name="weights")
    mixed = build.op("MatMul", [weights, value], name="mix")
    if packed:
        joined = build.op("Transpose", [mixed], {"perm": [0, 2, 1, 3]}, name="joined")
        mixed = build.op("Reshape", [joined, build.constant("shape", [0, 0, -1])], name="merged")
    replace_all_uses(node.outputs[0], mixed)
    node.outputs.clear()
