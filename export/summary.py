"""What a finished export tells its user: one JSON object, or a closing table."""

from __future__ import annotations

import sys
from typing import Any

from export.pipeline import Outcome


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome as plain JSON values."""
    parity = outcome.parity.model_dump(mode="json")
    return {
        "bundle": str(outcome.bundle),
        "dense_onnx": str(outcome.dense_onnx),
        "size": outcome.size,
        "passed": parity["passed"],
        "macs": parity["macs"],
        "tokens_per_block": outcome.plan.counts,
        "rungs": parity["rungs"],
        "engine": parity["engine"] | {"kernels": outcome.engine.kernels, "built": outcome.engine.status},
    }


def print_summary(outcome: Outcome) -> None:
    """The closing table, on stdout."""
    from rich.markup import escape
    from rich.table import Table

    from patchslim.console import Console
    from validate.parity import what_it_proves
    from validate.report import rung_table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    macs = outcome.macs
    facts = Table.grid(padding=(0, 2))
    saved = f"{macs.slim / 1e9:.3f} G of {macs.dense / 1e9:.3f} G: {macs.reduction:.1%} removed"
    facts.add_row("MACs", f"{saved} ({macs.layout} qkv)")
    facts.add_row("tokens", " ".join(map(str, outcome.plan.counts)) + f" of {outcome.plan.tokens}")
    facts.add_row("engine", outcome.engine.summary())
    facts.add_row("size", f"{outcome.size / 1e6:.1f} MB")
    facts.add_row("dense ONNX", escape(str(outcome.dense_onnx)))
    facts.add_row("bundle", escape(str(outcome.bundle)))
    console.print(rung_table(outcome.parity.rungs, f"top-1 on {outcome.parity.evaluation.images} held-out images"))
    for line in what_it_proves(outcome.parity.rungs, outcome.parity.gate.max_top1_drop):
        console.print(line)
    console.print(facts)
