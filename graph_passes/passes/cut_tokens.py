"""Cut each block to the tokens that the plan keeps: rectangular attention.

Queries and shortcut take the kept rows of the block's input, keys and values all of them. Everything after that runs on kept
rows. In mode ``stale`` the dropped rows are put back behind the updated ones, so that later blocks can read their last
values. The last block is cut to what the plan says the head reads. A block that keeps all its rows gets no cut.

A plan may merge dropped tokens into kept ones. To the kept rows the dropped ones are then added: in split layout times a
constant matrix, in packed layout by weighted sums of rows that a constant table takes, which TensorRT fuses with what is beside
them. A key that stands for several tokens gets the logarithm of their number added before the Softmax. Where anything but
linear layers lies between the block's norm and the rows taken, such as a norm of queries and keys together, the graph is
refused (``token_merging.py``).

Before: every block computes all the rows it reads. After: block l computes ``plan.kept[l]``, by a Slice where the kept rows
lead (after ``order_tokens``) and by a Gather of constants where they do not (``--cut`` chooses another form); a packed qkv
projection stays packed. A graph that already merges tokens is never cut again. Site: a block.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.analysis.vit_structure import find_structure
from graph_passes.cutting.plan_layout import ensure_plan_fits, layout_of_plan, needs_cut
from graph_passes.cutting.token_cutter import apply_layout
from graph_passes.pass_registry import MergeForm, Settings, graph_pass


@graph_pass("cut_tokens", needs_plan=True, after=("expand_attention", "order_tokens", "split_qkv"))
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns the number of blocks cut. Raises ``MatchFailure`` and ``PlanMismatch``."""
    plan, structure = settings.require_plan(), find_structure(graph)
    ensure_plan_fits(structure, plan)
    if not needs_cut(structure, plan):
        return 0
    merge: MergeForm = "sum" if settings.layout == "packed" else "matrix"
    apply_layout(graph, structure, layout_of_plan(structure, plan), settings.cut, merge)
    embedded = len(structure.order)
    reads = [embedded, *(plan.counts if plan.mode == "compact" else [embedded] * plan.depth)]
    return sum(count < read for count, read in zip(plan.counts, reads, strict=False))
