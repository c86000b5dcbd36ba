"""What a finished export tells its user: one JSON object, or a closing table."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from export.engines.base import EngineResult
from export.pipeline import Outcome
from validate.explain import blame, compared, verdict_of, what_it_proves
from validate.manifest import LatencyRecord
from validate.parity_records import PrecisionTrial


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome as plain JSON values."""
    parity = outcome.parity.model_dump(mode="json")
    gate = outcome.parity.gate
    proves = what_it_proves(outcome.parity.rungs, gate.max_top1_drop, gate.rule)
    found = {
        "bundle": str(outcome.bundle),
        "dense_onnx": str(outcome.dense_onnx),
        "dense_onnx_holds": dense_onnx_holds(outcome),
        "size": outcome.size,
        "passed": parity["passed"],
        "gate": parity["gate"] | {"proves": proves},
        "macs": parity["macs"],
        "latency": outcome.latency and outcome.latency.model_dump(mode="json"),
        "tokens_per_block": outcome.plan.counts,
        "merge_blocks": outcome.plan.origin.merge_blocks,
        "walk": outcome.plan.origin.walk and outcome.plan.origin.walk.model_dump(mode="json"),
        "rungs": parity["rungs"],
        "comparison": parity["comparison"],
        "blame": [dataclasses.asdict(each) for each in blame(outcome.parity.rungs)],
        "verdict": verdict_of(outcome.parity.rungs) or "passed",
        "bisections": [dataclasses.asdict(each) | {"first": each.first} for each in outcome.bisections],
        "advice": outcome.advice and dataclasses.asdict(outcome.advice),
        "kept_parts": list(outcome.kept_parts),
        "precision_trials": [each.model_dump(mode="json") for each in outcome.trials],
        "engine": parity["engine"] | _built(outcome.engine),
    }
    if len(outcome.attempts) > 1:
        built = [_built(one.engine) for one in outcome.attempts]
        found["engines"] = [stated | more for stated, more in zip(parity["engines"], built, strict=True)]
    return found


def _built(engine: EngineResult) -> dict[str, Any]:
    """What is known of an engine that its manifest does not say."""
    return {"kernels": engine.kernels, "dense_kernels": engine.dense_kernels, "built": engine.status}


def dense_onnx_holds(outcome: Outcome) -> str:
    """What the dense ONNX file of an export is."""
    return "the original" if outcome.plan.weights is None else "the refitted weights, uncut"


def latency_text(found: LatencyRecord) -> str:
    """What a budget of latency asked, what the table promised, and what was measured in the end."""
    reduces = found.criterion == "latency-reduction"
    asked = f"{found.asked:.1%} less" if reduces else f"{found.asked:.4g} ms"
    parts = [f"asked {asked}", f"table promised {_times(found.promised_ms, found.table_dense_ms)}"]
    if found.measured_ms is None or found.dense_ms is None:
        parts.append("not measured: the engine does not run here")
    else:
        limit = (1 - found.asked) * found.dense_ms if reduces else found.asked
        kept = "" if found.measured_ms <= limit else " (more than asked)"
        parts.append(f"measured {_times(found.measured_ms, found.dense_ms)}{kept}")
    return f"{', '.join(parts)}; batches of {found.batch} on {found.measured_on or found.device}"


def trial_text(trial: PrecisionTrial) -> str:
    """A precision that was tried, in one line."""
    parts = [f"{trial.precision}{' (chosen)' if trial.chosen else ''}", trial.status]
    if trial.ms is not None:
        parts.append(f"{trial.ms:.4g} ms a batch of {trial.batch}")
    if trial.top1_drop is not None:
        parts.append(f"drop {trial.top1_drop:.2f}")
    if trial.kept:
        parts.append(f"without {', '.join(trial.kept)}")
    return ", ".join([*parts, trial.note] if trial.note else parts)


def _headings(outcome: Outcome) -> list[str]:
    """What each engine is called: by its stage in the ladder."""
    return [one.names.engine for one in outcome.attempts]


def _time_of(engine: str, outcome: Outcome) -> str:
    """How long one of several engines takes, and what an image costs in it where cuts are laid as for the first is not."""
    found = next((one for one in outcome.parity.engines if one.name == engine), None)
    if found is None:
        return ""
    said = "" if found.ms is None else f", {found.ms:.4g} ms a batch of {found.batch}"
    if found.macs != outcome.macs:
        said += f", {found.macs.slim / 1e9:.3f} GMACs: {found.macs.reduction:.1%} removed ({found.macs.layout} qkv)"
    return said


def _times(slim: float, dense: float) -> str:
    return f"{slim:.4g} of {dense:.4g} ms, {1 - slim / dense:.1%} less"


def print_summary(outcome: Outcome) -> None:
    """The closing table, on stdout."""
    from rich.markup import escape
    from rich.table import Table

    from patchslim.console import Console
    from slimming.report.tables import walk_table
    from validate.report import blame_table, rung_table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    macs = outcome.macs
    facts = Table.grid(padding=(0, 2))
    saved = f"{macs.slim / 1e9:.3f} G of {macs.dense / 1e9:.3f} G: {macs.reduction:.1%} removed"
    facts.add_row("MACs", f"{saved} ({macs.layout} qkv)")
    facts.add_row("tokens", " ".join(map(str, outcome.plan.counts)) + f" of {outcome.plan.tokens}")
    if outcome.plan.origin.merge_blocks is not None:
        facts.add_row("tokens go", escape(outcome.plan.origin.merge_blocks))
    if outcome.latency is not None:
        facts.add_row("latency", escape(latency_text(outcome.latency)))
    for one, heading in zip(outcome.attempts, _headings(outcome), strict=True):
        facts.add_row(heading, one.engine.summary() + _time_of(one.request.engine, outcome))
        for trial in one.trials:
            facts.add_row("" if trial is not one.trials[0] else "precisions", escape(trial_text(trial)))
        if one.kept:
            facts.add_row(f"not in {one.engine.precision}", ", ".join(one.kept))
    facts.add_row("size", f"{outcome.size / 1e6:.1f} MB")
    facts.add_row("dense ONNX", escape(f"{outcome.dense_onnx} ({dense_onnx_holds(outcome)})"))
    facts.add_row("bundle", escape(str(outcome.bundle)))
    if outcome.plan.origin.walk is not None:
        console.print(walk_table(outcome.plan.origin.walk, macs.dense))
    console.print(rung_table(outcome.parity.rungs, f"top-1 on {outcome.parity.evaluation.images} held-out images"))
    gate = outcome.parity.gate
    for line in what_it_proves(outcome.parity.rungs, gate.max_top1_drop, gate.rule):
        console.print(line)
    if outcome.parity.comparison is not None:
        console.print(compared(outcome.parity.comparison))
    for found in outcome.bisections:
        console.print(str(found))
    if not outcome.parity.passed:
        console.print(blame_table(outcome.parity.rungs))
    console.print(facts)
