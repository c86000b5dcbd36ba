"""Order the tokens once, so that every later cut is one slice.

Once positions are added, what a block computes does not depend on the order of its tokens. Where they enter the first block,
the tokens are put in the plan's order (prefix tokens, then patches, those kept longest first), and so is every constant with
one row per token, such as rotary tables and biases between tokens.

Before: patches row by row. After: ``plan.order()``; where that is the order they are in already, nothing is inserted. Site: the
Gather.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.analysis.patterns import MatchFailure, label
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.cutting.plan_layout import ensure_plan_fits, needs_cut, uniform_layout
from graph_passes.cutting.token_cutter import apply_layout
from graph_passes.pass_registry import Settings, graph_pass


@graph_pass("order_tokens", needs_plan=True, after=("repair_reshapes", "drop_patches"))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns 1 if the tokens were put in order, else 0. Raises ``MatchFailure`` and ``PlanMismatch``."""
    plan, structure = settings.require_plan(), find_structure(graph)
    ensure_plan_fits(structure, plan)
    order = [token for token in plan.order() if token in structure.order]  # without those that were never embedded
    if not needs_cut(structure, plan) or structure.order == order:
        return 0
    if structure.order != sorted(order):
        raise MatchFailure(
            label(structure.stream[0].inputs[0]), "the tokens are already ordered for another plan; use the dense graph"
        )
    apply_layout(graph, structure, uniform_layout(structure, order), settings.cut)
    return 1
