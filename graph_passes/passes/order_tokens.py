"""Order the tokens once, so that every later cut is a prefix slice.

Blocks do not care about the order of their tokens once positions are added. Patches are put in the plan's order (longest kept
first) by one Gather of constants on the patch axis, and a position embedding that is added behind it is permuted to match.
Prefix tokens stay at the front.

Before: patches row by row. After: ``plan.order()``; where that is the order they are in already, nothing is inserted. Site: the
Gather.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.match import MatchFailure, label, make_constant, operands
from graph_passes.registry import Settings, graph_pass
from graph_passes.structure import find_structure
from graph_passes.tokens import ensure_fit, needs_cut


@graph_pass("order_tokens")
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns 1 if the patches were put in order, else 0; raises ``MatchFailure`` and ``PlanMismatch``."""
    plan, structure = settings.require_plan(), find_structure(graph)
    ensure_fit(structure, plan)
    stem, order = structure.stem, plan.order()
    if not needs_cut(structure, plan) or stem.order == order:
        return 0
    if stem.gather is not None:
        raise MatchFailure(label(stem.gather), "the tokens are already ordered for another plan")
    prefix = list(range(stem.prefix_tokens))
    if order[: stem.prefix_tokens] != prefix:
        raise MatchFailure(label(stem.concat), f"expected an order that leaves the prefix tokens {prefix} at the front")
    indices = make_constant("token_order.indices", [token - stem.prefix_tokens for token in order[stem.prefix_tokens :]])
    out = gs.Variable("token_order.out", dtype=stem.patches.dtype)
    graph.nodes.append(gs.Node("Gather", "token_order", {"axis": 1}, [stem.patches, indices], [out]))
    stem.concat.inputs[-1] = out
    for number, node in enumerate(stem.positions):
        parts = operands(node)
        assert parts is not None  # the matcher saw to it
        index = 1 if node.inputs[0] is parts[0] else 0
        node.inputs[index] = make_constant(f"token_order.positions_{number}", np.take(parts[1], order, axis=1))
    return 1
