"""Leave out axes of length 1 that a Reshape makes and a Squeeze takes away again.

Who unpacks queries, keys and values by ``reshape(b, n, 3, heads, width)`` and then takes one of the three gets such axes, and
a node for each that does nothing. TensorRT drops them by itself, so that this runs for the layout ``split`` only.

Before: Reshape to [b, n, 1, h, d], Transpose, Squeeze. After: Reshape to [b, n, h, d], Transpose. Site: a Squeeze.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.analysis.patterns import integers, produced_by
from graph_passes.node_builder import make_constant, replace_all_uses
from graph_passes.pass_registry import Settings, graph_pass


@graph_pass("drop_unit_axes", after=("split_qkv",))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of Squeezes removed."""
    if settings.layout != "split":
        return 0
    outputs = {id(tensor) for tensor in graph.outputs}
    return sum(_drop(node, outputs) for node in graph.nodes if node.op == "Squeeze")


def _drop(squeeze: gs.Node, outputs: set[int]) -> bool:
    axes = integers(squeeze.inputs[1]) if len(squeeze.inputs) > 1 else None
    source = squeeze.inputs[0]
    if axes is None or len(axes) != 1 or source.shape is None or id(squeeze.outputs[0]) in outputs:
        return False
    axis, transposes, tensor = axes[0] % len(source.shape), list[gs.Node](), source
    while (node := produced_by(tensor, "Transpose")) is not None and _read_once(tensor, outputs) and "perm" in node.attrs:
        axis, tensor = node.attrs["perm"][axis], node.inputs[0]
        transposes.append(node)
    reshape = produced_by(tensor, "Reshape")
    shape = None if reshape is None or not _read_once(tensor, outputs) else integers(reshape.inputs[1])
    if reshape is None or shape is None or shape[axis] != 1 or 0 in shape[axis:] or reshape.attrs.get("allowzero", 0):
        return False  # a 0 stands for the length of the input's axis at the same place
    reshape.inputs[1] = make_constant(f"{reshape.outputs[0].name}.shape", [*shape[:axis], *shape[axis + 1 :]])
    for node in reversed(transposes):
        order = list(node.attrs["perm"])
        place = order.index(axis)
        node.attrs["perm"] = [index - (index > axis) for index in order if index != axis]
        axis = place
    for node in (reshape, *transposes):
        node.outputs[0].shape = None
    replace_all_uses(squeeze.outputs[0], source)
    squeeze.outputs.clear()
    return True


def _read_once(tensor: gs.Tensor, outputs: set[int]) -> bool:
    return len(tensor.outputs) == 1 and id(tensor) not in outputs
