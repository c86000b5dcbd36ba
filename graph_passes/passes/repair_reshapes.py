"""Give each Reshape in the blocks a shape of its own that names no token count.

Exporters write the token count into the constants of Reshapes, and share one constant among all blocks; after a cut it would be
wrong. The new shapes copy the batch (0) and infer the tokens (-1), or the other way round, so they hold for any cut. Where a
shape needs the number, as behind a Gemm that reads images and tokens on one axis, ``cut_tokens`` writes the new one.

Before: shapes [-1, N, ...] with allowzero, shared. After: [0, -1, ...] without allowzero, one constant per use. Only where the
plan cuts something. Site: a Reshape.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.analysis.axes import Batch, Tokens, axis_size, has
from graph_passes.analysis.axis_map import AxisMap
from graph_passes.analysis.patterns import integers
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.cutting.plan_layout import ensure_plan_fits, needs_cut
from graph_passes.node_builder import make_constant
from graph_passes.pass_registry import Settings, graph_pass


@graph_pass("repair_reshapes", needs_plan=True, after=("find_blocks",))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of Reshapes changed. Raises ``MatchFailure`` and ``PlanMismatch``."""
    plan, structure = settings.require_plan(), find_structure(graph)
    ensure_plan_fits(structure, plan)
    if not needs_cut(structure, plan):
        return 0
    nodes = structure.axis_map.nodes
    first = nodes.index(structure.stream[0].inputs[0])
    return sum(_free(structure.axis_map, node) for node in nodes[first + 1 :] if node.op == "Reshape")


def _free(axis_map: AxisMap, reshape: gs.Node) -> bool:
    """Make a Reshape independent of the token count; returns whether it was changed."""
    shape, before, after = integers(reshape.inputs[1]), axis_map.of(reshape.inputs[0]), axis_map.of(reshape.outputs[0])
    if shape is None or before is None or after is None or not any(has(axis, Tokens) for axis in after):
        return False
    wanted = []
    for index, axis in enumerate(after):
        if not has(axis, Tokens, Batch):
            wanted.append(axis_size(axis))
        else:
            wanted.append(0 if index < len(before) and before[index] == axis else -1)
    if wanted.count(-1) > 1 or (shape == wanted and not reshape.attrs.get("allowzero", 0)):
        return False
    reshape.attrs.pop("allowzero", None)
    reshape.inputs[1] = make_constant(f"{reshape.outputs[0].name}.shape", wanted)
    return True
