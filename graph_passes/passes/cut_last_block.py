"""Cut the last block to the tokens that the head reads: exact, and needs no plan.

Where the head reads the class token alone, nothing reads what the last block computes for the other tokens: 6.9 % of DeiT-Ti's
multiply-accumulates. A head that pools reads them all, and its block is not cut. A plan cuts the last block as well; this pass
is for a model without a plan.

Before: the last block computes all tokens. After: those that the head reads one by one. Site: the block.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.analysis.vit_structure import find_structure
from graph_passes.cutting.token_cutter import apply_layout
from graph_passes.cutting.token_sets import TokenLayout
from graph_passes.pass_registry import Settings, graph_pass


@graph_pass("cut_last_block", default=False)
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns 1 if the last block was cut, else 0. Raises ``MatchFailure``."""
    structure = find_structure(graph)
    last = structure.blocks[-1]
    kept = [token for token in last.computes if structure.pools or token in structure.head_tokens]
    if kept == last.computes:
        return 0
    read = [*(block.reads for block in structure.blocks), kept]
    computed = [*(block.computes for block in structure.blocks[:-1]), kept]
    apply_layout(graph, structure, TokenLayout(structure, read, computed), settings.cut)
    return 1
