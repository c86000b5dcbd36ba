"""Find the Vision Transformer in the graph, and change nothing: says whether the other passes will understand it.

Tokens are followed from the images to the head: where patches become tokens, which attentions read and compute which of
them, what the head reads. Where they cannot be followed, the refusal names the node and what was expected there.

Before and after: any graph. Site: none.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.analysis.vit_structure import find_structure
from graph_passes.pass_registry import Settings, graph_pass


@graph_pass("find_blocks", after=("fold_constants",))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns 0. Raises ``MatchFailure`` for a graph that is not understood."""
    find_structure(graph)
    return 0
