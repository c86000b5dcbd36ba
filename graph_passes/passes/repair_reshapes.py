"""Give each attention whose token count will change Reshape shapes of its own that name no token count.

Exporters bake the token count into Reshape constants, and share one constant among all blocks; after a cut they would be
wrong. The new shapes copy the batch (0) and infer the tokens (-1), so they hold for any cut.

Before: shapes [-1, N, ...] with allowzero, shared. After: [0, -1, ...] without allowzero, one constant per use, in every
block that the plan cuts or that reads fewer tokens than the graph embeds; other blocks are as they were. Site: a Reshape.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.match import integers, make_constant
from graph_passes.registry import Settings, graph_pass
from graph_passes.structure import find_structure
from graph_passes.tokens import ensure_fit, needs_cut


@graph_pass("repair_reshapes")
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of Reshapes changed; raises ``MatchFailure`` and ``PlanMismatch``."""
    plan, structure = settings.require_plan(), find_structure(graph)
    ensure_fit(structure, plan)
    if not needs_cut(structure, plan):
        return 0
    sites, rows = 0, plan.tokens
    for block, count in zip(structure.blocks, plan.counts, strict=True):
        attention = block.attention
        if min(rows, count) < plan.tokens:
            sites += _free(attention.kv_reshape, f"{block.site.replace(' ', '_')}.qkv_shape")
            sites += _free(attention.out_reshape, f"{block.site.replace(' ', '_')}.out_shape")
        rows = count if plan.mode == "compact" else plan.tokens
    return sites


def _free(reshape: gs.Node, name: str) -> int:
    """Make a Reshape to ``[B, n, ...]`` independent of n; returns 1, or 0 where it is already so."""
    shape = integers(reshape.inputs[1]) or []
    wanted = [0, -1, *shape[2:]]
    if shape == wanted and not reshape.attrs.get("allowzero", 0):
        return 0
    reshape.attrs.pop("allowzero", None)
    reshape.inputs[1] = make_constant(name, wanted)
    return 1
