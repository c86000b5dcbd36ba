"""The engines of one bundle: each built and measured as if it were alone, and their ladders joined to one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.engine_times import TIMED_BATCH, engine_times
from export.logits import Measured
from export.parity import macs_of
from export.precision import Attempt, Slimmed, attempt
from export.source import ExportSource
from export.stage_names import onnx_file
from export.stages import EngineRequest, Workspace, dense_kernels
from patchslim.choices import EngineName
from patchslim.plan import SlimPlan
from validate.parity_records import BundledEngine, ParityReport, ladder_passed

if TYPE_CHECKING:
    from export.options import ExportOptions


@dataclass(frozen=True)
class EveryAttempt:
    """What became of every engine of a bundle, the first to be served; ``parity`` is the ladder of all."""

    attempts: Sequence[Attempt]
    parity: ParityReport

    @property
    def first(self) -> Attempt:
        """The engine that the bundle is served by."""
        return self.attempts[0]

    @property
    def graphs(self) -> dict[str, Path]:
        """The ONNX files by stage; one that several engines are built from is there once."""
        return {stage: path for one in self.attempts for stage, path in one.graphs.items()}

    @property
    def measured(self) -> Measured:
        """What every stage answered."""
        found = [one.measured for one in self.attempts]
        return dataclasses.replace(
            self.first.measured,
            logits={stage: logits for one in found for stage, logits in one.logits.items()},
            batch_errors={stage: error for one in found for stage, error in one.batch_errors.items()},
        )


def every_attempt(
    options: ExportOptions, requests: Sequence[EngineRequest], source: ExportSource, slimmed: Slimmed, work: Workspace
) -> EveryAttempt:
    """Every engine that is asked for, each in its precision; where they are several, those of this CPU are timed in turn."""
    attempts: list[Attempt] = []
    graphs: dict[str, Path] = {}
    for request in requests:
        found = attempt(options.for_engine(request.engine), request, source, slimmed, work)
        if any(graphs.get(stage, path) != path for stage, path in found.graphs.items()):  # it keeps other parts from INT8
            names = dataclasses.replace(request.names, quantised=request.engine)
            renamed = dataclasses.replace(request, names=names)
            found = attempt(options.for_engine(request.engine), renamed, source, slimmed, work)  # all of it is kept by now
        beside = dense_kernels(slimmed.dense, source.dense_plan, found.request, work)
        attempts.append(dataclasses.replace(found, engine=dataclasses.replace(found.engine, dense_kernels=beside)))
        graphs |= found.graphs
    if len(attempts) == 1:
        return EveryAttempt(attempts, attempts[0].parity)
    on_cpu = {one.request.engine: one.timed for one in attempts if one.parity.passed and one.engine.targets == ["cpu"]}
    times = engine_times(on_cpu, work, "engines") if len(on_cpu) > 1 and options.measure_latency else {}
    return EveryAttempt(attempts, joined(attempts, slimmed.plan, times))


def joined(attempts: Sequence[Attempt], plan: SlimPlan, times: Mapping[EngineName, float]) -> ParityReport:
    """The ladder of every engine: the first one's, and what the others have that is not in it yet, judged as they were.

    ``times`` are those of a batch in milliseconds.
    """
    first = attempts[0].parity
    ladder = list({rung.stage: rung for one in attempts for rung in one.parity.rungs}.values())
    engines = [
        BundledEngine(
            name=one.request.engine,
            stage=one.names.engine,
            onnx=onnx_file(one.names.onnx(one.request.graph)),
            macs=macs_of(plan, one.request.layout),
            engine=one.parity.engine,
            ms=times.get(one.request.engine),
            batch=TIMED_BATCH if one.request.engine in times else None,
            kept_parts=list(one.kept),
            precision_trials=list(one.trials),
        )
        for one in attempts
    ]
    return first.model_copy(update={"rungs": ladder, "engines": engines, "passed": ladder_passed(ladder)})
