"""Split the packed qkv projection of a cut block, so that queries are projected for kept tokens only.

The weight is split ahead of time: ``W_qkv [d, 3d]`` into ``W_q [d, d]``, applied to kept rows of the norm's output, and
``W_kv [d, 2d]``, applied to all. It saves the dropped tokens' query projection, and costs more and smaller kernels: right for
a CPU, while TensorRT runs the packed form with fewer kernels.

Before: one projection, its queries cut behind it (``cut_tokens``). After: two, the cut before the query projection. A block
that is not cut stays packed. Runs for the layout ``split`` only. Site: a block.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.attention import Attention
from graph_passes.match import MatchFailure, constant, integers, label, make_constant, replace_input, rows_taken, take_rows
from graph_passes.passes.fold_scale import set_linear
from graph_passes.registry import Settings, graph_pass
from graph_passes.structure import Block, find_structure


@graph_pass("split_qkv")
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of blocks split; raises ``MatchFailure``."""
    if settings.layout != "split":
        return 0
    blocks = [block for block in find_structure(graph).blocks if block.attention.cut is not None and block.attention.packed]
    for block in blocks:
        _split(graph, block)
    return len(blocks)


def _split(graph: gs.Graph, block: Block) -> None:
    attention, name = block.attention, block.site.replace(" ", "_")
    assert attention.cut is not None
    positions = rows_taken(attention.cut, 2, block.rows)
    if positions is None:
        raise MatchFailure(label(attention.cut), "expected constant rows of the queries")
    width = attention.heads * attention.head_dim
    packed = attention.keys_values
    set_linear(packed, f"{name}.kv", packed.weight[:, width:], None if packed.bias is None else packed.bias[width:])
    shape = integers(attention.kv_reshape.inputs[1]) or []
    attention.kv_reshape.inputs[1] = make_constant(f"{name}.kv_shape", [*shape[:2], 2, *shape[3:]])
    _shift_entries(attention)
    rows = take_rows(graph, attention.norm.outputs[0], positions, 1, f"{name}.queried")
    queries = _project(graph, attention, rows, f"{name}.q")
    old = attention.cut.outputs[0]
    for reader in list(old.outputs):
        replace_input(reader, old, queries)


def _project(graph: gs.Graph, attention: Attention, rows: gs.Variable, name: str) -> gs.Variable:
    """Append ``rows [B, k, d] -> queries [B, H, k, dh]``."""
    width, packed = attention.heads * attention.head_dim, attention.keys_values

    def append(op: str, suffix: str, inputs: list[gs.Tensor], **attrs: object) -> gs.Variable:
        out = gs.Variable(f"{name}.{suffix}.out", dtype=rows.dtype)
        graph.nodes.append(gs.Node(op, f"{name}.{suffix}", attrs, inputs, [out]))
        return out

    tensor = append("MatMul", "matmul", [rows, make_constant(f"{name}.weight", packed.weight[:, :width])])
    if packed.bias is not None:
        tensor = append("Add", "add", [tensor, make_constant(f"{name}.bias", packed.bias[:width])])
    shape = make_constant(f"{name}.shape", [0, -1, attention.heads, attention.head_dim])
    return append("Transpose", "heads", [append("Reshape", "reshape", [tensor, shape])], perm=[0, 2, 1, 3])


def _shift_entries(attention: Attention) -> None:
    """Renumber the entries of the unpacked projection, which has no queries any more: keys from 1 to 0, values from 2 to 1."""
    transpose = attention.kv_reshape.outputs[0].outputs[0]
    for node in list(transpose.outputs[0].outputs):
        name = node.outputs[0].name
        if node.op == "Split":
            queries = node.outputs.pop(0)
            for reader in list(queries.outputs):
                reader.inputs.clear()
            node.inputs = node.inputs[:1]
            node.attrs["num_outputs"] = 2
        elif node.op == "Gather":
            index = constant(node.inputs[1])
            if index is not None and index.reshape(-1)[0]:
                node.inputs[1] = make_constant(f"{name}.entry", index - 1)
        elif node.op == "Slice":
            (start,) = integers(node.inputs[1]) or [0]
            if start:
                node.inputs[1] = make_constant(f"{name}.start", [start - 1])
                node.inputs[2] = make_constant(f"{name}.end", [start])
