"""A Vision Transformer of two blocks, as small as one can be, for attacks to damage; written by hand, without an exporter."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from patchslim.macs import Geometry
from patchslim.plan import Origin, SlimPlan

BLOCK = """
  n{i} = LayerNormalization <axis = -1> (x{i}, scale, bias)
  q{i} = MatMul(n{i}, wq{i})  qh{i} = Reshape(q{i}, heads)  qt{i} = Transpose <perm = [0, 2, 1, 3]> (qh{i})
  k{i} = MatMul(n{i}, wk{i})  kh{i} = Reshape(k{i}, heads)  kt{i} = Transpose <perm = [0, 2, 3, 1]> (kh{i})
  v{i} = MatMul(n{i}, wv{i})  vh{i} = Reshape(v{i}, heads)  vt{i} = Transpose <perm = [0, 2, 1, 3]> (vh{i})
  qs{i} = Mul(qt{i}, root)  s{i} = MatMul(qs{i}, kt{i})  p{i} = Softmax <axis = -1> (s{i})  a{i} = MatMul(p{i}, vt{i})
  at{i} = Transpose <perm = [0, 2, 1, 3]> (a{i})  ar{i} = Reshape(at{i}, width)  o{i} = MatMul(ar{i}, wo{i})
  y{i} = Add(x{i}, o{i})  m{i} = LayerNormalization <axis = -1> (y{i}, scale, bias)
  u{i} = MatMul(m{i}, wu{i})  g{i} = Gelu(u{i})  d{i} = MatMul(g{i}, wd{i})  x{j} = Add(y{i}, d{i})
"""
GRAPH = f"""
vit (float[batch, 3, 8, 8] images) => (float[batch, 3] logits) {{
  grid = Conv <kernel_shape = [4, 4], strides = [4, 4]> (images, patch)  rows = Reshape(grid, flat)
  tokens = Transpose <perm = [0, 2, 1]> (rows)
  batch = Shape <start = 0, end = 1> (images)  sizes = Concat <axis = 0> (batch, one, eight)  first = Expand(class, sizes)
  all = Concat <axis = 1> (first, tokens)  x0 = Add(all, positions)
  {BLOCK.format(i=0, j=1)} {BLOCK.format(i=1, j=2)}
  normed = LayerNormalization <axis = -1> (x2, scale, bias)  answer = Gather <axis = 1> (normed, zero)
  logits = MatMul(answer, head)
}}
"""
WEIGHTS = {
    "patch": (8, 3, 4, 4), "class": (1, 1, 8), "positions": (1, 5, 8), "scale": (8,), "bias": (8,), "head": (8, 3),
    **{f"w{name}{block}": (8, 8) for name in "qkvo" for block in (0, 1)},
    **{f"wu{block}": (8, 16) for block in (0, 1)}, **{f"wd{block}": (16, 8) for block in (0, 1)},
}  # fmt: skip
INTEGERS = {"flat": [0, 8, 4], "heads": [0, -1, 2, 4], "width": [0, -1, 8], "one": [1], "eight": [8], "zero": 0}


def parsed(
    text: str, weights: dict[str, tuple[int, ...]] | None = None, integers: dict[str, object] | None = None
) -> onnx.ModelProto:
    """A model from ONNX's text format, with initializers: random float32 of the shapes given, and int64 of the values given."""
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_graph(text)
    for name, shape in (weights or {}).items():
        graph.initializer.append(numpy_helper.from_array(rng.normal(0, 0.5, shape).astype(np.float32), name))
    for name, values in (integers or {}).items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def tiny_vit() -> onnx.ModelProto:
    """Images of 8 x 8, four patches and a class token, width 8, two heads."""
    model = parsed(GRAPH, WEIGHTS, INTEGERS)
    root = numpy_helper.from_array(np.float32(0.5), "root")
    model.graph.initializer.append(root)
    return model


def plan() -> SlimPlan:
    """A plan for ``tiny_vit``: three of five tokens behind the first block, the class token behind the last."""
    return SlimPlan(
        model="tiny", tokens=5, grid=(2, 2), prefix_tokens=1, pooling="token", head_tokens=[0], mode="compact",
        kept=[[0, 2, 3], [0]], geometry=Geometry(embed_dim=8, mlp_hidden_dim=16, patch_macs=4 * 3 * 16 * 8, head_macs=24),
        origin=Origin(score="none", criterion="manual", value=0.0),
    )  # fmt: skip
