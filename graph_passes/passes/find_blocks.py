"""Find the Vision Transformer in the graph, and change nothing: tells whether the other passes will understand it.

Tokens are followed from the images to the head: where patches become tokens, which attentions read and compute which of
them, what the head takes. Where that ends too early, the node and what was expected there are the answer.

Before and after: any graph. Site: none.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.analysis.vit_structure import find_structure
from graph_passes.pass_registry import Settings, graph_pass


@graph_pass("find_blocks")
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns 0; raises ``MatchFailure`` for a graph that is not understood."""
    find_structure(graph)
    return 0
