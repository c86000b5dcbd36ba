"""Fold the scale and shift of a norm into the linear layers that read it.

``(n g + h) W + b = n (g W) + (h W + b)``, where n is what the norm makes of a token, g and h are its scale and shift, and g
scales the rows of W: exact, and one pass over the tokens less for runtimes that compute scale and shift by themselves, as
OpenVINO does. TensorRT has them in the kernel of the norm, so that this runs for the layout ``split`` only.

Before: a LayerNormalization with scale and shift, read by products with a bias of at most a million weights (up to ViT-S), and
by nothing else but for its shape. After: its scale is one, it has no shift, and the products have new constants. Site: a norm.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.linear_layers import Linear, linear_at, set_bias, set_weight
from graph_passes.analysis.patterns import constant_value
from graph_passes.node_builder import make_constant
from graph_passes.pass_registry import Settings, graph_pass

#: Weights of the largest layer that is folded into. Beyond it a pass over the tokens is little beside the product, and new
#: weights would take the memory that those in the file do not.
_LARGEST = 1 << 20


@graph_pass("fold_norm", after=("fold_scale",))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of norms that lost scale and shift."""
    if settings.layout != "split":
        return 0
    outputs = {id(tensor) for tensor in graph.outputs}
    norms = [node for node in graph.nodes if node.op == "LayerNormalization"]
    return sum(_fold(norm, outputs, f"norm_{number}") for number, norm in enumerate(norms))


def _fold(norm: gs.Node, outputs: set[int], name: str) -> bool:
    scale, shift = (constant_value(norm.inputs[index]) if index < len(norm.inputs) else None for index in (1, 2))
    tensor = norm.outputs[0]
    if (
        scale is None
        or scale.ndim != 1
        or norm.attrs.get("axis", -1) not in (-1, len(tensor.shape or ()) - 1)
        or (len(norm.inputs) > 2 and (shift is None or shift.shape != scale.shape))
        or id(tensor) in outputs
        or (shift is None and (scale == 1).all())
    ):
        return False
    readers = [_layer(tensor, reader) for reader in tensor.outputs if reader.op != "Shape"]
    layers = [
        layer
        for layer in readers
        if layer is not None and layer.weight.shape[0] == scale.size and layer.weight.size <= _LARGEST
    ]
    if not layers or len(layers) < len(readers):
        return False
    for number, layer in enumerate(layers):
        weight, added = _folded(layer.weight, scale, np.zeros_like(scale) if shift is None else shift)
        assert layer.bias is not None
        set_weight(layer, f"{name}.layer_{number}.weight", weight)
        set_bias(layer, f"{name}.layer_{number}.bias", (layer.bias.astype(np.float64) + added).astype(layer.bias.dtype))
    norm.inputs = [norm.inputs[0], make_constant(f"{name}.scale", np.ones_like(scale))]
    return True


def _layer(tensor: gs.Tensor, product: gs.Node) -> Linear | None:
    """The linear layer with a bias whose product reads ``tensor``; None where the reader is none."""
    output = product.outputs[0]
    added = output.outputs[0] if len(output.outputs) == 1 and output.outputs[0].op == "Add" else None
    found = [linear_at(end) for end in (output, *([] if added is None else added.outputs))]
    layer = next((one for one in reversed(found) if one is not None and one.bias is not None), None)
    return layer if layer is not None and layer.product is product and layer.source is tensor else None


def _folded(
    weight: NDArray[np.generic], scale: NDArray[np.generic], shift: NDArray[np.generic]
) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    """``g W`` rounded once, and ``h W``, for a weight [in, out]."""
    wide = weight.astype(np.float64)
    added: NDArray[np.float64] = (wide * shift.astype(np.float64)[:, None]).sum(axis=0)  # BLAS takes memory for each thread
    wide *= scale.astype(np.float64)[:, None]
    return wide.astype(weight.dtype), added
