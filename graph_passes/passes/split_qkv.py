"""Split the packed qkv projection of a block that will be cut, so that queries are projected for kept tokens only.

The weight is split ahead of time: ``W_qkv [d, 3d]`` into ``W_q [d, d]`` and ``W_kv [d, 2d]``. Which columns belong to the
queries is found by following the columns' numbers through whatever unpacks them, so any way of packing is understood. It saves
the query projection of dropped tokens, and takes more and smaller kernels: right for a CPU, while TensorRT runs the packed
form with fewer kernels.

Before: one projection. After: two, so that ``cut_tokens`` takes the kept rows before the query projection. A block that the
plan does not cut stays packed, and separate projections stay as they are. Runs for the layout ``split`` only. Site: a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.analysis.axes import Batch, Tokens, axis_size, has, token_axis
from graph_passes.analysis.axis_map import Attention, AxisMap
from graph_passes.analysis.linear_layers import Columns, Linear, columns_of, projection_outputs
from graph_passes.analysis.operators import DATA_MOVEMENT_OPS
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.cutting.plan_layout import ensure_plan_fits, needs_cut
from graph_passes.node_builder import NodeBuilder, replace_all_uses
from graph_passes.pass_registry import Settings, graph_pass


@graph_pass("split_qkv", needs_plan=True, after=("repair_reshapes", "fold_scale"))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of blocks split. Raises ``MatchFailure`` and ``PlanMismatch``."""
    if settings.layout != "split":
        return 0
    plan, structure = settings.require_plan(), find_structure(graph)
    ensure_plan_fits(structure, plan)
    if not needs_cut(structure, plan):
        return 0
    sites, reads = 0, len(structure.order)
    for block, count in zip(structure.blocks, plan.counts, strict=True):
        if count < reads:
            split = [
                _split(graph, structure.axis_map, attention, block.site.replace(" ", "_")) for attention in block.attentions
            ]
            sites += any(split)
        reads = count if plan.mode == "compact" else len(structure.order)
    return sites


def _split(graph: gs.Graph, axis_map: AxisMap, attention: Attention, name: str) -> bool:
    """Give queries a projection of their own, where they share one with keys or values; returns whether they did."""
    queries = projection_outputs(axis_map, attention.queries)
    others = [leaf for operand in (attention.keys, attention.values) for leaf in projection_outputs(axis_map, operand)]
    if not queries or not others or queries[0].linear.product is not others[0].linear.product:
        return False
    linear = queries[0].linear
    if any(leaf.linear.product is not linear.product for leaf in (*queries, *others)):
        return False
    if {id(leaf.tensor) for leaf in queries} & {id(leaf.tensor) for leaf in others}:
        return False  # rotated, say, together with the keys
    rest = _rest(axis_map, linear, {int(number) for leaf in (*queries, *others) for number in leaf.values.flat})
    if (
        rest is None
        or not all(_can_move(axis_map, leaf) for leaf in (*queries, *others, *rest))
        or _source(axis_map, linear) is None
    ):
        return False
    for leaves, part in ((queries, "q"), (others, "kv"), (rest, "rest")):
        if leaves:
            _project(graph, axis_map, linear, leaves, f"{name}.{part}")
    return True


def _rest(axis_map: AxisMap, linear: Linear, taken: set[int]) -> list[Columns] | None:
    """What else a layer gives, as the MLP's hidden values of a parallel block; None where it is not apart from ``taken``."""
    found: list[Columns] = []
    pending: list[gs.Tensor] = [linear.output]
    while pending:
        tensor = pending.pop()
        columns = columns_of(tensor, axis_map)
        numbers = set() if columns is None else {int(number) for number in columns.values.flat}
        if columns is not None and not numbers & taken:
            found.append(columns)
        elif not numbers <= taken:
            if any(reader.op not in DATA_MOVEMENT_OPS for reader in tensor.outputs):
                return None
            pending.extend(output for reader in tensor.outputs for output in reader.outputs)
    return found


def _can_move(axis_map: AxisMap, leaf: Columns) -> bool:
    """Whether a tensor is images and tokens, each on an axis of its own, and features that are the same for all tokens."""
    return _image_axis(axis_map, leaf.tensor) is not None and leaf.of_one_token(axis_map) is not None


def _image_axis(axis_map: AxisMap, tensor: gs.Tensor) -> int | None:
    """The axis of the images; of a single one, which Reshapes may have left out, any axis of length 1."""
    axes = axis_map.of(tensor) or ()
    images = [index for index, axis in enumerate(axes) if has(axis, Batch)]
    empty = [index for index, axis in enumerate(axes) if axis == () and axis_map.batch == Batch(1)]
    return next(iter(images + empty), None)


def _source(axis_map: AxisMap, linear: Linear) -> gs.Tensor | None:
    """What the layer reads, images and tokens each on an axis of its own: a Gemm reads them merged."""
    source = linear.source
    while (axes := axis_map.of(source)) is not None and (len(axes) != 3 or token_axis(axes) not in (0, 1)):
        node = source.inputs[0] if source.inputs else None
        if node is None or node.op not in DATA_MOVEMENT_OPS:
            return None
        source = node.inputs[0]
    return None if axes is None else source


def _project(graph: gs.Graph, axis_map: AxisMap, linear: Linear, exits: Sequence[Columns], name: str) -> None:
    """Append a projection to the columns of ``exits`` alone, laid out as they were, and let their readers read it."""
    source = _source(axis_map, linear)
    assert source is not None  # the caller saw to it
    build = NodeBuilder(graph, name, source.dtype, output="out_0")
    picked = [numbers for leaf in exits if (numbers := leaf.of_one_token(axis_map)) is not None]
    columns = np.concatenate([numbers.reshape(-1) for numbers in picked])
    tensor = build.op("MatMul", [source, build.constant("weight", linear.weight[:, columns])], name="matmul")
    if linear.bias is not None:
        tensor = build.op("Add", [tensor, build.constant("bias", linear.bias[columns])], name="add")
    parts = [tensor]
    if len(exits) > 1:
        sizes = build.constant("sizes", [numbers.size for numbers in picked])
        parts = build.op_multi_output("Split", [tensor, sizes], {"axis": 2}, num_outputs=len(exits), name="split")
    for number, (leaf, part) in enumerate(zip(exits, parts, strict=True)):
        order, features = _order(axis_map, source, leaf.tensor)
        shape = build.constant(f"shape_{number}", [0, 0, *features])
        part = build.op("Reshape", [part, shape], name=f"reshape_{number}")
        if order != sorted(order):
            part = build.op("Transpose", [part], {"perm": order}, name=f"transpose_{number}")
        replace_all_uses(leaf.tensor, part)


def _order(axis_map: AxisMap, source: gs.Tensor, target: gs.Tensor) -> tuple[list[int], list[int]]:
    """How ``[the source's two leading axes, features...]`` becomes the target, and the lengths of these features."""
    place, after, images = token_axis(axis_map.of(source) or ()) or 0, axis_map.of(target) or (), _image_axis(axis_map, target)
    order, features = [], list[int]()
    for index, axis in enumerate(after):
        if has(axis, Tokens) or index == images:
            order.append(1 - place if index == images else place)
        else:
            order.append(2 + len(features))
            features.append(axis_size(axis))
    return order, features
