"""The stages of a latency budget: the table that it is solved on, and what the plan takes in the end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from export.latency.conditions import TimingConditions
from export.source import ExportSource
from export.stages import Workspace, dense_folder, dense_onnx, onnxruntime_providers
from patchslim import cuda
from patchslim.errors import Unavailable
from patchslim.latency_table import load_table
from patchslim.plan import SlimPlan
from patchslim.records import load_record, save_record
from patchslim.timing import processor_name
from slimming.search.budget import LATENCY
from validate.manifest import LatencyRecord

if TYPE_CHECKING:
    from export.options import ExportOptions


def latency_table(options: ExportOptions, source: ExportSource, work: Workspace) -> Path | None:
    """The table that a latency budget is solved on: the given one, or measured once on the dense graph; None without one.

    Raises ``InputRejected`` where a given table was measured for something else.
    """
    if not needs_latency_table(options):
        return None
    plan = source.dense_plan.model_copy(update={"mode": options.mode})
    conditions = _conditions(options, source)
    if options.latency_table is not None:
        load_table(options.latency_table).ensure_fits(plan, options.layout, conditions.merged)
        return options.latency_table
    dense = dense_onnx(source.original, source.model, work)
    folder = latency_folder(options, source, dense, work)

    def build(part: Path) -> None:
        from export.latency.measure import measure_table

        with work.reporter.stages("points") as progress:
            measure_table(work.cache.verified(dense), plan, conditions, progress=progress).save(part / "latency_table.json")

    work.cache.make(folder, build)
    return folder / "latency_table.json"


def latency_folder(options: ExportOptions, source: ExportSource, dense: Path, work: Workspace) -> Path:
    """Where the latency table of the ``dense`` graph on this machine is, or will be."""
    return work.cache.path(
        "latency",
        dense=work.facts.digest(dense),
        conditions=dataclasses.asdict(_conditions(options, source)),
        machine=(platform.node(), processor_name(), os.cpu_count(), cuda.local_target()),
        providers=onnxruntime_providers(work.facts),
    )


def latency_record(
    options: ExportOptions, source: ExportSource, table: Path | None, plan: SlimPlan, dense: Path, slim: Path, work: Workspace
) -> LatencyRecord | None:
    """What a budget of latency asked, what ``table`` promised of ``plan``, and what ``slim`` takes here; None without one."""
    if table is None:
        return None
    known = load_table(table)
    conditions = dataclasses.replace(_conditions(options, source), batch=known.batch, threads=known.threads)
    folder = work.cache.path(
        "measured",
        table=work.facts.digest(table),
        dense=work.facts.digest(dense),
        slim=work.facts.digest(slim),
        plan=plan.model_dump(mode="json"),
        asked=dataclasses.asdict(options.budget),
        conditions=dataclasses.asdict(conditions),
        machine=(platform.node(), processor_name(), os.cpu_count(), cuda.local_target()),
        providers=onnxruntime_providers(work.facts),
    )

    def build(part: Path) -> None:
        from export.latency.measure import measure_pair

        budget = options.budget
        assert budget.criterion in LATENCY
        record = LatencyRecord.model_validate(
            {
                "criterion": budget.criterion,
                "asked": budget.value if budget.within is None else plan.origin.value,
                "batch": known.batch,
                "device": known.device,
                "table_dense_ms": known.dense(),
                "promised_ms": known.of(plan.counts),
            }
        )
        with contextlib.suppress(Unavailable), work.reporter.stages("rounds") as progress:  # a GPU that is not here
            graphs = work.cache.verified(dense), work.cache.verified(slim)
            found = measure_pair(*graphs, source.dense_plan, conditions, progress=progress)
            here = {"measured_on": found.device, "dense_ms": found.dense_ms, "measured_ms": found.slim_ms}
            record = record.model_copy(update=here)
        save_record(part / "latency.json", record)

    work.cache.make(folder, build)
    return load_record(work.cache.verified(folder / "latency.json"), LatencyRecord, "latency record")


def needs_latency_table(options: ExportOptions) -> bool:
    """Whether a plan is searched within a budget of latency."""
    return options.plan is None and not options.dense and options.budget.criterion in LATENCY


def known_latency_table(options: ExportOptions, source: ExportSource, work: Workspace) -> Path | None:
    """The table that ``latency_table`` would give without measuring; None where it has to."""
    if options.latency_table is not None or not needs_latency_table(options):
        return latency_table(options, source, work)
    dense = dense_folder(source.original, source.model, work.cache) / "dense.onnx"
    if not work.cache.whole(dense.parent):
        return None
    folder = latency_folder(options, source, dense, work)
    return folder / "latency_table.json" if work.cache.whole(folder) else None


def _conditions(options: ExportOptions, source: ExportSource) -> TimingConditions:
    return TimingConditions(
        layout=options.layout,
        mode=options.mode,
        merged=options.merges(fixed_head=bool(source.dense_plan.head_tokens)),
        engine=options.primary,
        precision=options.engine_precision,
        batch=options.batch_size,
    )
