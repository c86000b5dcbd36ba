"""How fast the slim graph is here, beside the dense one: a stage of its own, for ``latency.json`` and the report."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from export.stages import Workspace, onnxruntime_providers
from patchslim import cuda
from patchslim.choices import Layout
from patchslim.plan import SlimPlan
from patchslim.records import save_record
from patchslim.timing import processor_name
from validate.bundle import LATENCY


def measured_speed(dense: Path, slim: Path, plan: SlimPlan, layout: Layout, work: Workspace) -> Path:
    """``latency.json`` of ``slim`` against ``dense`` on this machine, measured once."""
    folder = work.cache.path(
        "speed",
        dense=work.facts.digest(dense),
        slim=work.facts.digest(slim),
        machine=(platform.node(), processor_name(), os.cpu_count(), cuda.local_target()),
        providers=onnxruntime_providers(work.facts),
    )

    def build(part: Path) -> None:
        from validate.latency_sheet import latency_sheet

        work.reporter.say("timing the slim graph against the dense one")
        ratio = plan.dense_macs() / plan.macs(layout)
        save_record(part / LATENCY, latency_sheet(work.cache.verified(dense), work.cache.verified(slim), ratio))

    work.cache.make(folder, build)
    return folder / LATENCY
