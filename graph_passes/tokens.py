"""Which tokens every block of a graph computes: what the plan wants, and what the graph already does."""

from __future__ import annotations

from dataclasses import dataclass

from graph_passes.match import MatchFailure, label, rows_taken
from graph_passes.structure import Block, Structure
from slimming.door import InputRejected
from slimming.plan import SlimPlan

#: Why a plan with a summary is refused.
NO_SUMMARY = "summary tokens are not cut into ONNX graphs yet"


class PlanMismatch(InputRejected):
    """The plan is for another model than this graph (exit 3)."""


@dataclass(frozen=True)
class Cut:
    """Rows of one block: ``positions`` of its input rows are queried, the ``rest`` are not."""

    block: Block
    positions: list[int]
    rest: list[int]


def ensure_no_summary(plan: SlimPlan) -> None:
    """Raise ``InputRejected`` for a plan that keeps a summary of its dropped tokens."""
    if plan.summary:
        raise InputRejected(f"the plan for '{plan.model}': {NO_SUMMARY}")


def ensure_fit(structure: Structure, plan: SlimPlan) -> None:
    """Raise ``PlanMismatch`` unless the plan's sizes are those of the graph."""
    model = {
        "blocks": len(structure.blocks),
        "tokens": structure.tokens,
        "prefix tokens": structure.stem.prefix_tokens,
        "patch grid": structure.stem.grid,
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
    if not set(structure.head_tokens) <= set(plan.head_tokens):
        faults.append(f"head tokens: the graph's head reads {structure.head_tokens}, the plan says {plan.head_tokens}")
    if plan.head_tokens != list(range(len(plan.head_tokens))):
        faults.append(f"head tokens: the passes need them to lead, the plan says {plan.head_tokens}")
    if faults:
        raise PlanMismatch(f"the plan for '{plan.model}' does not fit this graph: " + "; ".join(faults))


def cuts_wanted(structure: Structure, plan: SlimPlan) -> list[Cut]:
    """For every block of an uncut graph the rows to query, given the order its tokens are in."""
    present, cuts = list(structure.stem.order), []
    for block, kept in zip(structure.blocks, plan.kept, strict=True):
        wanted = set(kept)
        positions = [i for i, token in enumerate(present) if token in wanted]
        rest = [i for i, token in enumerate(present) if token not in wanted]
        cuts.append(Cut(block, positions, rest))
        dropped = [present[i] for i in rest]
        present = [present[i] for i in positions] + (dropped if plan.mode == "stale" else [])
    return cuts


def needs_cut(structure: Structure, plan: SlimPlan) -> bool:
    """Whether the plan's cuts still have to be made.

    False where the graph already computes exactly the plan's tokens. Raises ``MatchFailure`` where it was cut by another plan.
    """
    if all(block.shortcut_cut is None and block.attention.cut is None for block in structure.blocks):
        return not plan.is_dense
    present = list(structure.stem.order)
    for block, kept in zip(structure.blocks, plan.kept, strict=True):
        updated, rest = _rows_of(block)
        if sorted(present[i] for i in updated) != kept:
            raise MatchFailure(block.site, f"already cut to other tokens ({len(updated)}) than the plan keeps ({len(kept)})")
        last = block is structure.blocks[-1]
        if not last and block.shortcut_cut is not None and (block.write_back is not None) != (plan.mode == "stale"):
            raise MatchFailure(block.site, f"already cut, but not in the plan's mode, {plan.mode}")
        present = [present[i] for i in (*updated, *rest)]
    return False


def _rows_of(block: Block) -> tuple[list[int], list[int]]:
    """Positions of the block's input rows that it updates, and of those it puts back unchanged."""
    queried, shortcut = block.attention.cut, block.shortcut_cut
    if (queried is None) != (shortcut is None):
        raise MatchFailure(block.site, "expected queries and shortcut to be cut alike; only one of them is")
    if queried is None or shortcut is None:
        return list(range(block.rows)), []
    taken = rows_taken(shortcut, 1, block.rows)
    if taken is None or taken != rows_taken(queried, 2 if block.attention.packed else 1, block.rows):
        raise MatchFailure(label(queried), f"expected the same constant rows as on the shortcut of {block.site}")
    if block.write_back is None:
        return taken, []
    rest_node = block.write_back.inputs[1].inputs[0]
    rest = rows_taken(rest_node, 1, block.rows)
    if rest is None or sorted(taken + rest) != list(range(block.rows)):
        raise MatchFailure(label(rest_node), f"expected the rows that {block.site} does not update")
    return taken, rest
