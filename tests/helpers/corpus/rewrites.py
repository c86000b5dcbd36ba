"""Forms that no exporter here emits any more, made by editing timm's unfused dynamo export, which has Slice+Squeeze,
the scale on q, and MatMul+Add.

Each rewrite takes a model and returns a new one that computes the same function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tests.helpers.corpus.models import DEPTH, HEADS, WIDTH

ROOT_SCALE = np.float32((WIDTH // HEADS) ** -0.25)
SCALE = np.float32((WIDTH // HEADS) ** -0.5)


class _Attention:
    """The nodes of one attention: q, k, v as Squeeze of Slice of ``packed``; Mul, MatMul, Softmax, MatMul."""

    def __init__(self, softmax: gs.Node) -> None:
        self.softmax = softmax
        self.scores = softmax.i(0)
        self.scaled, self.keys = self.scores.i(0), self.scores.i(1)
        assert (self.scaled.op, self.keys.op) == ("Mul", "Transpose")
        squeezes = [self.scaled.i(0), self.keys.i(0), softmax.o(0).i(1)]
        assert [node.op for node in squeezes] == ["Squeeze"] * 3
        self.parts = [node.outputs[0] for node in squeezes]
        self.packed = squeezes[0].i(0).inputs[0]


_NUMBERS = itertools.count()


def _constant(name: str, values: object) -> gs.Constant:
    return gs.Constant(f"rewritten_{name}_{next(_NUMBERS)}", np.asarray(values))


def _edited(model: onnx.ModelProto, edit: Callable[[gs.Graph, _Attention], None]) -> onnx.ModelProto:
    graph = gs.import_onnx(model)
    attentions = [_Attention(node) for node in graph.nodes if node.op == "Softmax"]
    assert len(attentions) == DEPTH
    for attention in attentions:
        edit(graph, attention)
    return _finished(graph, model)


def _finished(graph: gs.Graph, model: onnx.ModelProto) -> onnx.ModelProto:
    graph.cleanup().toposort()
    result = gs.export_onnx(graph)
    result.ir_version = model.ir_version
    return result


def _split_qkv(graph: gs.Graph, attention: _Attention) -> None:
    """q, k, v by one Split and three Squeezes, as TorchScript's ``unbind`` gives."""
    cuts = [gs.Variable(f"{part.name}_cut", part.dtype) for part in attention.parts]
    graph.layer(op="Split", inputs=[attention.packed, _constant("sizes", [1, 1, 1])], outputs=cuts, attrs={"axis": 0})
    for cut, part in zip(cuts, attention.parts, strict=True):
        part.inputs.clear()
        graph.layer(op="Squeeze", inputs=[cut, _constant("axes", [0])], outputs=[part])


def _gather_qkv(graph: gs.Graph, attention: _Attention) -> None:
    """q, k, v by Gather with scalar indices, as ``qkv[0], qkv[1], qkv[2]`` gave in TorchScript exports."""
    for index, part in enumerate(attention.parts):
        part.inputs.clear()
        graph.layer(op="Gather", inputs=[attention.packed, _constant("part", index)], outputs=[part], attrs={"axis": 0})


def _scale_on_k(graph: gs.Graph, attention: _Attention) -> None:
    attention.scores.inputs[0] = attention.scaled.inputs[0]
    attention.scores.inputs[1] = _scaled(graph, "Mul", attention.keys.outputs[0], SCALE)


def _scale_on_both(graph: gs.Graph, attention: _Attention) -> None:
    attention.scaled.inputs[1] = _constant("scale", ROOT_SCALE)
    attention.scores.inputs[1] = _scaled(graph, "Mul", attention.keys.outputs[0], ROOT_SCALE)


def _scale_as_div(graph: gs.Graph, attention: _Attention) -> None:
    attention.scores.inputs[0] = _scaled(graph, "Div", attention.scaled.inputs[0], 1 / SCALE)


def _scale_after(graph: gs.Graph, attention: _Attention) -> None:
    """Scores scaled between MatMul and Softmax, dividing as the first ViTs of Hugging Face did."""
    attention.scores.inputs[0] = attention.scaled.inputs[0]
    attention.softmax.inputs[0] = _scaled(graph, "Div", attention.scores.outputs[0], 1 / SCALE)


def _scaled(graph: gs.Graph, op: str, value: gs.Tensor, by: np.float32) -> gs.Variable:
    result = gs.Variable(f"{value.name}_scaled", value.dtype)
    graph.layer(op=op, inputs=[value, _constant("scale", np.float32(by))], outputs=[result])
    return result


def _linears(graph: gs.Graph) -> Iterator[tuple[gs.Node, gs.Node]]:
    """Every MatMul with a weight, and the Add of its bias."""
    for node in list(graph.nodes):
        if node.op == "MatMul" and isinstance(node.inputs[1], gs.Constant) and node.o().op == "Add":
            yield node, node.o()


def _gemm(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every linear layer as Reshape to rows, Gemm, Reshape back."""
    graph = gs.import_onnx(model)
    changed = 0
    for product, add in _linears(graph):
        weight: gs.Constant = product.inputs[1]
        bias = next(value for value in add.inputs if isinstance(value, gs.Constant))
        fan_in, fan_out = weight.values.shape
        tokens = product.inputs[0].shape[1]
        rows, result = (gs.Variable(f"{add.name}_{part}", np.float32) for part in ("rows", "gemm"))
        transposed = gs.Constant(f"{weight.name}_transposed_{add.name}", np.ascontiguousarray(weight.values.T))
        (output,) = add.outputs
        output.inputs.clear()
        graph.layer(op="Reshape", inputs=[product.inputs[0], _constant("rows", [-1, fan_in])], outputs=[rows])
        graph.layer(op="Gemm", inputs=[rows, transposed, bias], outputs=[result], attrs={"transB": 1})
        graph.layer(op="Reshape", inputs=[result, _constant("tokens", [-1, tokens, fan_out])], outputs=[output])
        changed += 1
    assert changed == 4 * DEPTH
    return _finished(graph, model)


def _by(edit: Callable[[gs.Graph, _Attention], None]) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    return lambda model: _edited(model, edit)


REWRITES: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "split-qkv": _by(_split_qkv),
    "gather-qkv": _by(_gather_qkv),
    "scale-on-k": _by(_scale_on_k),
    "scale-on-both": _by(_scale_on_both),
    "scale-as-div": _by(_scale_as_div),
    "scale-after": _by(_scale_after),
    "gemm": _gemm,
}
