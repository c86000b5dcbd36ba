"""Which tokens each block of a graph is to compute by a plan, and which it computes already."""

from __future__ import annotations

from graph_passes.analysis.patterns import MatchFailure, label
from graph_passes.analysis.vit_structure import Structure
from graph_passes.cutting.token_merging import Merges, ensure_merged
from graph_passes.cutting.token_sets import TokenLayout
from patchslim.errors import InputRejected
from patchslim.plan import SlimPlan


class PlanMismatch(InputRejected):
    """The plan is for another model than this graph (exit code 3)."""


def ensure_plan_fits(structure: Structure, plan: SlimPlan) -> None:
    """Raise ``PlanMismatch`` unless depth, tokens, grid, width and head of the plan are those of the graph."""
    model = {
        "blocks": len(structure.blocks),
        "tokens": structure.tokens,
        "prefix tokens": structure.prefix_tokens,
        "patch grid": structure.grid,
        "token width": structure.width,
    }
    wanted = {
        "blocks": plan.depth,
        "tokens": plan.tokens,
        "prefix tokens": plan.prefix_tokens,
        "patch grid": tuple(plan.grid),
        "token width": plan.geometry.embed_dim,
    }
    faults = [f"{key}: the graph has {model[key]}, the plan says {wanted[key]}" for key in model if model[key] != wanted[key]]
    if not set(structure.head_tokens) <= set(plan.kept[-1]):
        kept = set(plan.head_tokens) & set(plan.kept[-1])
        faults.append(f"head tokens: the graph's head reads {structure.head_tokens}, the plan says {sorted(kept)}")
    elif structure.pools and plan.pooling == "token":
        faults.append("pooling: the graph's head pools all tokens, the plan is for one that reads single tokens")
    if faults:
        raise PlanMismatch(f"the plan for '{plan.model}' does not fit this graph: " + "; ".join(faults))


def embedded_tokens(plan: SlimPlan) -> list[int]:
    """The tokens that are left where patches that the first block drops are never embedded (see ``drop_patches``)."""
    merged = {token for token, into in enumerate(plan.merged_into or []) if into >= 0}  # later blocks drop what this one keeps
    return sorted({*range(plan.prefix_tokens), *plan.kept[0], *merged})


def layout_of_plan(structure: Structure, plan: SlimPlan) -> TokenLayout:
    """What each block reads and computes under the plan; tokens stay in the order that they have in the graph."""
    read, computed = [structure.order], []
    for kept in plan.kept:
        wanted = set(kept)
        computed.append([token for token in read[-1] if token in wanted])
        put_back = plan.mode == "stale" and len(computed) < plan.depth
        read.append(computed[-1] + [token for token in read[-1] if put_back and token not in wanted])
    return TokenLayout(structure, read, computed, None if plan.merged_into is None else Merges(structure, plan))


def uniform_layout(structure: Structure, tokens: list[int]) -> TokenLayout:
    """The layout in which every block reads and computes ``tokens``, in this order."""
    depth = len(structure.blocks)
    return TokenLayout(structure, [tokens] * (depth + 1), [tokens] * depth)


def needs_cut(structure: Structure, plan: SlimPlan) -> bool:
    """Whether the plan's cuts still have to be made: False where each block already computes exactly the plan's tokens.

    Patches that ``drop_patches`` left out do not count. Raises ``MatchFailure`` where the graph was cut by another plan.
    """
    embedded = structure.order
    if len(embedded) < plan.tokens and set(embedded) != set(embedded_tokens(plan)):
        raise MatchFailure(
            label(structure.stream[0].inputs[0]), "the patches of another plan were dropped already; use the dense graph"
        )
    if all(len(block.reads) == len(block.computes) == len(embedded) for block in structure.blocks):
        return any(count < len(embedded) for count in plan.counts)
    before: list[int] | None = None
    for block, kept in zip(structure.blocks, plan.kept, strict=True):
        if sorted(block.computes) != kept:
            found = f"already cut to other tokens ({len(block.computes)}) than the plan keeps ({len(kept)})"
            raise MatchFailure(block.site, found)
        if before is not None and len(block.reads) != (len(embedded) if plan.mode == "stale" else len(before)):
            raise MatchFailure(f"block {block.index - 1}", f"already cut, but not in the plan's mode, {plan.mode}")
        before = kept
    ensure_merged(structure, plan)
    return False
