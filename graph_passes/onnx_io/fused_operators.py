"""Writes out again what ONNX Runtime's optimiser fused, in operators of ONNX's own.

Each fused node gets a local function that says what it computes, in ONNX's own text form; inlining the functions does the rest.
What has no entry in ``_BODIES``, or is used in a way that its entry does not cover, stays, and is refused by name later.
The operators: onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
from onnx import defs, helper, parser

from graph_passes.onnx_io.model import OnnxModel

FUSED_DOMAIN = "com.microsoft"
#: ONNX Runtime registers these under ONNX's own name, in opsets in which ONNX has none of the kind.
_MISNAMED = {"LayerNormalization", "SimplifiedLayerNormalization"}
#: ONNX's own LayerNormalization is there from this opset on.
_LAYER_NORMALIZATION_OPSET = 17
_REDUCTION_AXES_AS_INPUT = 18
_NORMS = {"LayerNormalization", "SkipLayerNormalization"}
#: Numbers are written in float32 and cast: the type of the tensors beside them.
_TYPES = {int(onnx.TensorProto.FLOAT), int(onnx.TensorProto.FLOAT16), int(onnx.TensorProto.BFLOAT16)}


@dataclass(frozen=True)
class _Fused:
    """A fused node: which inputs it has, its attributes, and what is known around it.

    ``widths``: the last length of each constant input, 0 where it is not known. ``dtype``: what it computes in.
    """

    inputs: list[bool]
    outputs: list[bool]
    attributes: dict[str, object]
    widths: list[int]
    ranks: list[int]
    opset: int
    dtype: int

    def has(self, index: int) -> bool:
        """Whether the node has this input."""
        return index < len(self.inputs) and self.inputs[index]

    def only(self, *allowed: int) -> bool:
        """Whether all inputs that the node has are among these."""
        return all(index in allowed for index, there in enumerate(self.inputs) if there)

    def gives(self, *allowed: int) -> bool:
        """Whether all outputs that are read are among these."""
        return all(index in allowed for index, there in enumerate(self.outputs) if there)

    def number(self, name: str, default: float) -> float:
        """An attribute that is a number."""
        value = self.attributes.get(name, default)
        assert isinstance(value, int | float)
        return value

    def constant(self, name: str, value: float) -> str:
        """The line that makes ``name`` a number of the type that the node computes in."""
        return f"{name}_32 = Constant <value = float {{{value!r}}}> () {name} = Cast <to = {self.dtype}> ({name}_32)"


def name_fused(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The model with fused operators under ONNX Runtime's own domain, which it imports; None where that is so already.

    ONNX Runtime runs such nodes under ONNX's domain too, and where the import is missing; ONNX's checker refuses both.
    """
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    found = [
        index
        for index, node in enumerate(model.graph.node)
        if node.domain in ("", "ai.onnx") and node.op_type in _MISNAMED and not _is_known(node.op_type, opset)
    ]
    imported = any(entry.domain == FUSED_DOMAIN for entry in model.opset_import)
    if not found and (imported or all(node.domain != FUSED_DOMAIN for node in model.graph.node)):
        return None
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for index in found:
        result.graph.node[index].domain = FUSED_DOMAIN
    if not imported:
        result.opset_import.append(helper.make_opsetid(FUSED_DOMAIN, 1))
    return result


def _is_known(op: str, opset: int) -> bool:
    try:
        defs.get_schema(op, opset)
    except defs.SchemaError:
        return False
    return True


def needed_opset(model: onnx.ModelProto) -> int:
    """The lowest opset in which the fused nodes can be written out."""
    norms = any(node.domain == FUSED_DOMAIN and node.op_type in _NORMS for node in model.graph.node)
    return _LAYER_NORMALIZATION_OPSET if norms else 1


def expand_fused(model: OnnxModel) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of the skeleton with a local function for each fused node that can be written out; and the operators, by name."""
    if not any(node.domain == FUSED_DOMAIN for node in model.graph.node):
        return model.skeleton, []
    result = onnx.ModelProto()
    result.CopyFrom(model.skeleton)
    opset = max((entry.version for entry in result.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in result.graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in result.graph.initializer}
    shapes |= {name: weight.shape for name, weight in model.weights.items()}
    types |= {name: weight.data_type for name, weight in model.weights.items()}
    usual = _usual_type([types[name] for name in model.weights])
    read = {name for node in result.graph.node for name in node.input} | {value.name for value in result.graph.output}
    functions: dict[str, onnx.FunctionProto] = {}
    kinds: set[str] = set()
    for node in result.graph.node:
        body = _BODIES.get(node.op_type) if node.domain == FUSED_DOMAIN else None
        if body is None:
            continue
        own = [types[name] for name in node.input if types.get(name) in _TYPES]
        given = [shapes.get(name, ()) for name in node.input]
        text = body(
            _Fused(
                inputs=[bool(name) for name in node.input],
                outputs=[bool(name) and name in read for name in node.output],
                attributes={entry.name: helper.get_attribute_value(entry) for entry in node.attribute},
                widths=[shape[-1] if shape else 0 for shape in given],
                ranks=[len(shape) for shape in given],
                opset=opset,
                dtype=own[0] if own else usual,
            )
        )
        if text is None:
            continue
        if text not in functions:
            head = f'<opset_import: ["" : {opset}], domain: "{FUSED_DOMAIN}">\n{node.op_type}_{len(functions)} '
            functions[text] = parser.parse_function(head + text)
        function = functions[text]
        kinds.add(node.op_type)
        inputs = [entry for entry in node.input if entry]
        outputs = list(node.output)[: len(function.output)]
        del node.input[:], node.output[:], node.attribute[:]
        node.input.extend(inputs)
        node.output.extend(outputs)
        node.op_type = function.name
    result.functions.extend(functions.values())
    if result.ir_version < 8:  # the first that has functions
        result.ir_version = 8
    return result, sorted(kinds)


def _usual_type(types: list[int]) -> int:
    """The floating-point type of most weights."""
    found = [data_type for data_type in types if data_type in _TYPES]
    return max(set(found), key=found.count) if found else int(onnx.TensorProto.FLOAT)


_GELU = "e0 = Div ({x}, root) e1 = Erf (e0) e2 = Add (e1, one) e3 = Mul ({x}, e2) y = Mul (e3, half)"


def _gelu(node: _Fused) -> str | None:
    numbers = [node.constant(*pair) for pair in (("root", 2**0.5), ("one", 1.0), ("half", 0.5))]
    if node.has(1):
        return f"(x, b) => (y) {{ s = Add (x, b) {' '.join(numbers)} {_GELU.format(x='s')} }}"
    return f"(x) => (y) {{ {' '.join(numbers)} {_GELU.format(x='x')} }}"


def _fast_gelu(node: _Fused) -> str | None:
    pairs = (("one", 1.0), ("half", 0.5), ("cubic", 0.044715), ("slope", 0.7978845608028654))
    numbers = " ".join(node.constant(*pair) for pair in pairs)
    given, first = ("x, b", "s = Add (x, b)") if node.has(1) else ("x", "s = Identity (x)")
    steps = "s2 = Mul (s, s) s3 = Mul (s2, s) c = Mul (s3, cubic) i = Add (s, c) m = Mul (i, slope) t = Tanh (m)"
    return f"({given}) => (y) {{ {first} {numbers} {steps} a = Add (t, one) p = Mul (s, a) y = Mul (p, half) }}"


def _quick_gelu(node: _Fused) -> str | None:
    alpha = node.constant("alpha", node.number("alpha", 1.702))
    return f"(x) => (y) {{ {alpha} a = Mul (x, alpha) s = Sigmoid (a) y = Mul (x, s) }}"


def _layer_norm(node: _Fused) -> str | None:
    if not node.gives(0):
        return None
    given = "x, w, b" if node.has(2) else "x, w"
    axis, epsilon = int(node.number("axis", -1)), node.number("epsilon", 1e-5)
    return f"({given}) => (y) {{ y = LayerNormalization <axis = {axis}, epsilon = {epsilon!r}> ({given}) }}"


def _skip_layer_norm(node: _Fused) -> str | None:
    if not node.gives(0, 3):
        return None
    given = ["x", "skip", "w", *(["b"] if node.has(3) else []), *(["bias"] if node.has(4) else [])]
    total = "s = Add (x, skip)" if not node.has(4) else "s0 = Add (x, skip) s = Add (s0, bias)"
    norm = f"LayerNormalization <axis = -1, epsilon = {node.number('epsilon', 1e-12)!r}> (s, w{', b' if node.has(3) else ''})"
    return _with_sum(node, ", ".join(given), f"{total} y = {norm}")


def _with_sum(node: _Fused, given: str, body: str) -> str:
    """A function whose fourth output, where there is one, is the sum ``s``; the statistics between are read by nobody."""
    if len(node.outputs) < 4:
        return f"({given}) => (y) {{ {body} }}"
    return f"({given}) => (y, mean, deviation, s) {{ {body} mean = Identity (s) deviation = Identity (s) }}"


def _rms(node: _Fused, source: str) -> str:
    mean = "ReduceMean (square, last)" if node.opset >= _REDUCTION_AXES_AS_INPUT else "ReduceMean <axes = [-1]> (square)"
    last = "last = Constant <value = int64[1] {-1}> ()" if node.opset >= _REDUCTION_AXES_AS_INPUT else ""
    steps = f"square = Mul (f, f) m = {mean} a = Add (m, epsilon) r = Sqrt (a) n = Div (f, r) c = Cast <to = {node.dtype}> (n)"
    epsilon = f"epsilon = Constant <value = float {{{node.number('epsilon', 1e-5)!r}}}> ()"
    return f"{epsilon} {last} f = Cast <to = 1> ({source}) {steps} y = Mul (c, w)"


def _rms_norm(node: _Fused) -> str | None:
    if node.number("axis", -1) != -1 or not node.gives(0):
        return None
    return f"(x, w) => (y) {{ {_rms(node, 'x')} }}"


def _skip_rms_norm(node: _Fused) -> str | None:
    if not node.gives(0, 3):
        return None
    total = "s = Add (x, skip)" if not node.has(3) else "s0 = Add (x, skip) s = Add (s0, bias)"
    return _with_sum(node, "x, skip, w, bias" if node.has(3) else "x, skip, w", f"{total} {_rms(node, 's')}")


def _fused_matmul(node: _Fused) -> str | None:
    if node.number("transBatchA", 0) or node.number("transBatchB", 0):
        return None
    left, right = bool(node.number("transA", 0)), bool(node.number("transB", 0))
    alpha = node.number("alpha", 1.0)
    if not left and right and node.ranks[1] == 2:  # weights
        product = "t = Transpose <perm = [1, 0]> (b) p = MatMul (a, t)"
    elif left or right:  # of a rank that is found later
        product = f'p = Einsum <equation = "...{"ji" if left else "ij"},...{"kj" if right else "jk"}->...ik"> (a, b)'
    else:
        product = "p = MatMul (a, b)"
    scaled = "y = Identity (p)" if alpha == 1 else f"{node.constant('alpha', alpha)} y = Mul (p, alpha)"
    return f"(a, b) => (y) {{ {product} {scaled} }}"


def _heads(source: str, name: str) -> str:
    """The line that lays ``source [B, n, heads * width]`` out as ``name [B, heads, n, width]``."""
    return f"{name}_r = Reshape ({source}, unpacked) {name} = Transpose <perm = [0, 2, 1, 3]> ({name}_r)"


def _attend(scale: str, bias: bool) -> str:
    """From queries ``q``, keys ``k`` and values ``v``, each ``[B, heads, n, width]``, to ``y [B, n, heads * width]``."""
    scores = "g = Mul (q, scale) kt = Transpose <perm = [0, 1, 3, 2]> (k) w0 = MatMul (g, kt)"
    added = "w1 = Add (w0, positions)" if bias else "w1 = Identity (w0)"
    joined = "o = MatMul (w2, v) oj = Transpose <perm = [0, 2, 1, 3]> (o) y = Reshape (oj, packed)"
    return f"{scale} {scores} {added} w2 = Softmax <axis = -1> (w1) {joined}"


def _shapes(heads: int) -> str:
    return (
        f"unpacked = Constant <value = int64[4] {{0, 0, {heads}, -1}}> () packed = Constant <value = int64[3] {{0, 0, -1}}> ()"
    )


def _scale(node: _Fused, heads: int, width: int) -> str:
    """The line that makes ``scale``: given, or one by the root of a head's width, which is read of ``q`` where not known."""
    given = node.number("scale", 0.0)
    if given or width:
        return node.constant("scale", given or (width // heads) ** -0.5)
    steps = "l0 = Shape <start = 3> (q) l1 = Squeeze (l0) l2 = Cast <to = 1> (l1) l3 = Sqrt (l2) l4 = Reciprocal (l3)"
    return f"{steps} scale = Cast <to = {node.dtype}> (l4)"


def _attention(node: _Fused) -> str | None:
    """Packed weights [features, 3 * width]: queries, keys and values one behind the other."""
    heads, sizes = int(node.number("num_heads", 0)), node.attributes.get("qkv_hidden_sizes")
    plain = not any(node.number(name, 0) for name in ("unidirectional", "do_rotary", "past_present_share_buffer"))
    total = node.widths[1] if len(node.widths) > 1 else 0
    parts = [int(size) for size in sizes] if isinstance(sizes, list) and sizes else [total // 3] * 3
    if not heads or not total or sum(parts) != total or not plain or not node.only(0, 1, 2, 5) or not node.gives(0):
        return None
    given = ["x", "w", *(["b"] if node.has(2) else []), *(["positions"] if node.has(5) else [])]
    biased = "p = Add (p0, b)" if node.has(2) else "p = Identity (p0)"
    split = f"sizes = Constant <value = int64[3] {{{', '.join(map(str, parts))}}}> () q0, k0, v0 = Split <axis = 2> (p, sizes)"
    laid = " ".join(_heads(f"{part}0", part) for part in "qkv")
    body = f"{_shapes(heads)} p0 = MatMul (x, w) {biased} {split} {laid}"
    return f"({', '.join(given)}) => (y) {{ {body} {_attend(_scale(node, heads, parts[0]), node.has(5))} }}"


def _multi_head_attention(node: _Fused) -> str | None:
    """Queries, keys and values of three axes each."""
    heads = int(node.number("num_heads", 0))
    if not heads or node.number("unidirectional", 0) or not node.only(0, 1, 2, 3, 5) or not (node.has(1) and node.has(2)):
        return None
    if not node.gives(0) or (node.has(3) and (not node.widths[3] or node.widths[3] % 3)):
        return None
    given = ["q_in", "k_in", "v_in", *(["b"] if node.has(3) else []), *(["positions"] if node.has(5) else [])]
    width = node.widths[3] // 3 if node.has(3) else 0
    if node.has(3):
        parts = f"sizes = Constant <value = int64[3] {{{width}, {width}, {width}}}> () bq, bk, bv = Split <axis = 0> (b, sizes)"
        first = parts + " q0 = Add (q_in, bq) k0 = Add (k_in, bk) v0 = Add (v_in, bv)"
    else:
        first = "q0 = Identity (q_in) k0 = Identity (k_in) v0 = Identity (v_in)"
    laid = " ".join(_heads(f"{part}0", part) for part in "qkv")
    body = f"{_shapes(heads)} {first} {laid} {_attend(_scale(node, heads, width), node.has(5))}"
    return f"({', '.join(given)}) => (y) {{ {body} }}"


#: For each fused operator its function in ONNX's text form, or None where the node is used in a way that it does not cover.
_BODIES: dict[str, Callable[[_Fused], str | None]] = {
    "Attention": _attention,
    "BiasGelu": _gelu,
    "FastGelu": _fast_gelu,
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu,
    "LayerNormalization": _layer_norm,
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
}
