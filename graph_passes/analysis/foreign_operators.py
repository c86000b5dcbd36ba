"""Names what made a graph one that the passes cannot read, and what to give them instead."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.analysis.patterns import MatchFailure, label

#: What to do about a graph that is not understood, behind what is wrong with it.
NEXT_STEP = "docs/edge.md, 'Which graphs are understood', says how to export one that is"

_QUANTISED_OPS = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger",
    # of ONNX Runtime
    "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulBnb4", "MatMulFpQ4", "MatMulIntegerToFloat", "MatMulNBits",
    "QAttention", "QEmbedLayerNormalization", "QGemm", "QLinearAdd", "QLinearConcat", "QLinearMul", "QLinearSoftmax",
    "QOrderedAttention", "QOrderedMatMul",
}  # fmt: skip


def ensure_not_quantised(graph: gs.Graph) -> None:
    """Raise ``MatchFailure`` for a graph that was quantised, naming the order in which it is to be done."""
    for node in graph.nodes:
        if node.op in _QUANTISED_OPS:
            raise MatchFailure(
                label(node),
                "the graph is quantised; cut first, then quantise: give the floating-point model that it was made of, and "
                "quantise the result",
            )


def foreign_operator(node: gs.Node) -> MatchFailure | None:
    """Why a node of another domain than ONNX's own is not understood; None for one of ONNX's own."""
    domain = node.domain
    if domain in (None, "", "ai.onnx"):
        return None
    if domain.startswith("com.microsoft"):
        reason = (
            f"ONNX Runtime's optimiser made this operator of '{domain}', and it cannot be written out again; give the model as "
            "it was exported, before onnxruntime.transformers.optimizer or optimized_model_filepath, and optimise the result"
        )
    else:
        reason = (
            f"expected operators of ONNX's own; this one is of '{domain}': export the model without the library that adds it"
        )
    return MatchFailure(label(node), reason)


def of_other_form(graph: gs.Graph) -> MatchFailure | None:
    """What in a graph without an attention of a known form may be one of another form: a fused one, or an Einsum."""
    for node in graph.nodes:
        if "Attention" in node.op and (found := foreign_operator(node)) is not None:
            return found
    for node in graph.nodes:
        if node.op == "Einsum":
            return einsum_failure(node)
    return None


def einsum_failure(node: gs.Node) -> MatchFailure:
    """Why an Einsum is not understood."""
    equation = node.attrs.get("equation", "")
    return MatchFailure(
        label(node),
        f"expected an Einsum of two operands that is one product of matrices; this one is '{equation}': export the model with "
        "MatMul in its place",
    )
