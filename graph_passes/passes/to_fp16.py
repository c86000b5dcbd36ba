"""Type the graph as FP16: a strongly typed engine computes in the types that the ONNX file says.

Every float32 constant becomes float16, with one Cast behind each graph input and one before each output, which stay
float32. Two things stay in float32: the statistics of LayerNormalization (``stash_type`` 1), and each attention's Softmax,
between two Casts. TensorRT-RTX 1.7 still fuses every such attention into one kernel, at the same kernel count.

What prepares the images in the graph, ahead of the tokens (a Resize, say), stays as it is.

Before: float32 throughout. After: float16 between the Casts; it runs in ONNX Runtime and builds strongly typed. A graph with a
weight that float16 cannot hold is refused. Site: a constant.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.patterns import MatchFailure, label
from graph_passes.analysis.preprocessing import nodes_before
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.node_builder import NodeBuilder, make_constant, replace_all_uses
from graph_passes.pass_registry import Settings, graph_pass

FLOAT, FLOAT16 = int(onnx.TensorProto.FLOAT), int(onnx.TensorProto.FLOAT16)
LARGEST = float(np.finfo(np.float16).max)


@graph_pass("to_fp16", after=("fold_scale", "image_input", "elide_identities"))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of constants made float16. Raises ``MatchFailure``."""
    structure = find_structure(graph)
    ahead = nodes_before(structure.images)
    there = {id(node) for node in ahead}
    computing = [node for node in graph.nodes if id(node) not in there]
    constants = _float_constants(computing)
    if not constants:
        return 0
    halves = [(tensor, _half(tensor.name, np.asarray(tensor.values))) for tensor in constants]
    for tensor, values in halves:
        if any(id(reader) in there for reader in tensor.outputs):
            readers = [reader for reader in tensor.outputs if id(reader) not in there]
            replace_all_uses(tensor, make_constant(f"{tensor.name}.fp16", values), readers)
        else:
            tensor.values = values
    for node in computing:
        if node.op == "LayerNormalization":
            node.attrs["stash_type"] = 1
        elif node.op == "Cast" and node.attrs.get("to") == FLOAT:
            node.attrs["to"] = FLOAT16
    prepared = {id(tensor) for node in ahead for tensor in (*node.inputs, *node.outputs)}
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.dtype == np.float32 and id(tensor) not in prepared:
            tensor.dtype = np.dtype(np.float16)
    for attention in structure.axis_map.attentions:
        if attention.softmax is not None:
            _keep_softmax(graph, attention.softmax)
    for tensor in [t for t in graph.inputs if t.dtype == np.float16]:
        _cast_input(graph, tensor)
    if ahead and structure.images.dtype == np.float32:
        _cast_input(graph, structure.images)
    for index, tensor in enumerate(graph.outputs):
        if tensor.dtype == np.float16:
            graph.outputs[index] = _cast_output(graph, tensor)
    return len(halves)


def _float_constants(nodes: list[gs.Node]) -> list[gs.Constant]:
    """Every float32 initializer and node attribute of ``nodes``, in their order, each once."""
    found: dict[int, gs.Constant] = {}
    for node in nodes:
        if "value_float" in node.attrs or "value_floats" in node.attrs:
            raise MatchFailure(label(node), "expected constants as tensors; fold_constants first")
        for tensor in [*node.inputs, *(node.attrs.get(key) for key in ("value",))]:
            if isinstance(tensor, gs.Constant) and tensor.dtype == np.float32:
                found[id(tensor)] = tensor
    return list(found.values())


def _half(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    """``values`` in float16; raises ``MatchFailure`` where one is not finite or is too large."""
    largest = float(np.abs(values).max()) if values.size else 0.0
    if not largest <= LARGEST:  # NaN too
        raise MatchFailure(
            f"initializer '{name}'",
            f"its largest magnitude {largest:g} does not fit float16 (at most {LARGEST:g}); keep --precision fp32, or use bf16",
        )
    return values.astype(np.float16)


def _keep_softmax(graph: gs.Graph, softmax: gs.Node) -> None:
    """Compute a Softmax in float32, with a Cast before and one behind it."""
    scores, weights = softmax.inputs[0], softmax.outputs[0]
    build = NodeBuilder(graph, softmax.name, np.float32)
    softmax.inputs[0] = build.op("Cast", [scores], {"to": FLOAT}, name="to_fp32", output=f"{scores.name}.fp32")
    softmax.outputs[0] = gs.Variable(f"{weights.name}.fp32", dtype=np.float32)
    build.op("Cast", [softmax.outputs[0]], {"to": FLOAT16}, name="to_fp16", output=weights)


def _cast_input(graph: gs.Graph, tensor: gs.Variable) -> None:
    readers = [reader for reader in tensor.outputs if reader.op != "Shape"]
    tensor.dtype = np.dtype(np.float32)
    build = NodeBuilder(graph, tensor.name, np.float16)
    half = build.op("Cast", [tensor], {"to": FLOAT16}, name="to_fp16", output=build.name_of("fp16"), first=True)
    replace_all_uses(tensor, half, readers)


def _cast_output(graph: gs.Graph, tensor: gs.Variable) -> gs.Variable:
    """Append the Cast to float32 and return the new graph output, which takes over the old one's name."""
    out = gs.Variable(tensor.name, dtype=np.float32, shape=tensor.shape)
    tensor.name = f"{tensor.name}.fp16"
    return NodeBuilder(graph, out.name).op("Cast", [tensor], {"to": FLOAT}, name="to_fp32", output=out)
