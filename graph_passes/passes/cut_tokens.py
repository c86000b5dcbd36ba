"""Cut each block to the tokens that the plan keeps: rectangular attention.

Queries and shortcut take the kept rows of the block's input, keys and values all of them. Everything after that runs on kept
rows. In mode ``stale`` the dropped rows are put back behind the updated ones, so that later blocks can read their last
values. The last block is cut to what the plan says the head reads. A block that keeps all its rows gets no cut.

Before: every block computes all the rows it reads. After: block l computes ``plan.kept[l]``, by a Slice where the kept rows
lead (after ``order_tokens``) and by a Gather of constants where they do not; a cut block's qkv projection stays packed. Site:
a block.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.match import MatchFailure, replace_input, take_rows
from graph_passes.registry import Settings, graph_pass
from graph_passes.structure import find_structure
from graph_passes.tokens import Cut, cuts_wanted, ensure_fit, needs_cut


@graph_pass("cut_tokens")
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of blocks cut; raises ``MatchFailure`` and ``PlanMismatch``."""
    plan, structure = settings.require_plan(), find_structure(graph)
    ensure_fit(structure, plan)
    if not needs_cut(structure, plan):
        for block in structure.blocks:
            if settings.layout == "packed" and not block.attention.packed:
                raise MatchFailure(block.site, "already cut with split projections, where the packed layout is asked for")
        return 0
    cuts = [cut for cut in cuts_wanted(structure, plan) if cut.rest]
    # Last block first: a write-back must also reach the readers that cutting the next block adds.
    for cut in reversed(cuts):
        last = cut.block is structure.blocks[-1]
        _cut(graph, cut, write_back=plan.mode == "stale" and not last)
    return len(cuts)


def _cut(graph: gs.Graph, cut: Cut, *, write_back: bool) -> None:
    block, attention, name = cut.block, cut.block.attention, cut.block.site.replace(" ", "_")
    queries = attention.unpacked_q
    readers = list(queries.outputs)
    kept = take_rows(graph, queries, cut.positions, 2, f"{name}.queries")
    for reader in readers:
        replace_input(reader, queries, kept)
    shortcut = take_rows(graph, block.input, cut.positions, 1, f"{name}.shortcut")
    replace_input(attention.residual, block.input, shortcut)
    if write_back:
        readers = list(block.updated.outputs)
        rest = take_rows(graph, block.input, cut.rest, 1, f"{name}.dropped")
        out = gs.Variable(f"{name}.write_back.out", dtype=block.updated.dtype)
        graph.nodes.append(gs.Node("Concat", f"{name}.write_back", {"axis": 1}, [block.updated, rest], [out]))
        for reader in readers:
            replace_input(reader, block.updated, out)
