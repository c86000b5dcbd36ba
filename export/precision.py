"""Engines of one precision or of several: the fastest that passes the gate; of what is quantised few parts are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from export.engine_times import TIMED_BATCH, Timed, engine_times
from export.engines.base import ENGINES, QUANTISED, EngineResult
from export.engines.build import choose_backend
from export.logits import BuiltGraphs, Measured, answering_stages, measured_logits
from export.parity import parity_report
from export.quantised_graphs import Quantised, QuantisedGraphs, quantiser_for, why_not_quantised
from export.source import ExportSource, LazyModule
from export.stage_names import StageNames
from export.stages import EngineRequest, Workspace, built_engine, slim_onnx
from patchslim.choices import Precision
from patchslim.errors import InputRejected, Unavailable
from patchslim.plan import SlimPlan
from validate.parity_records import Gate, ParityReport, PrecisionTrial

if TYPE_CHECKING:
    from export.options import ExportOptions

#: A precision is taken before a higher one only where it is faster by more than timing tells apart.
_FASTER = 0.97


@dataclass(frozen=True)
class Slimmed:
    """What every precision starts from: the plan, the module that runs under it, and its dense graph."""

    plan: SlimPlan
    fitted: LazyModule
    dense: Path


@dataclass(frozen=True)
class Attempt:
    """An engine, the ONNX files behind it by stage, and what they answer; ``kept`` are the parts that are not quantised."""

    request: EngineRequest
    graphs: dict[str, Path]
    engine: EngineResult
    measured: Measured
    parity: ParityReport
    kept: Sequence[str] = ()
    trials: Sequence[PrecisionTrial] = field(default_factory=list)

    @property
    def names(self) -> StageNames:
        """What its stages are called."""
        return self.request.names

    @property
    def served(self) -> Path:
        """The ONNX file that the engine was built from."""
        return self.graphs[self.names.onnx(self.request.graph)]

    @property
    def timed(self) -> Timed:
        """What is timed of it."""
        return Timed(self.engine, self.served)


def attempt(options: ExportOptions, request: EngineRequest, source: ExportSource, slimmed: Slimmed, work: Workspace) -> Attempt:
    """The engine in the precision that is asked for, or in the fastest that passes the gate; see ``ExportOptions``."""
    if options.chooses_precision:
        return _fastest(options, request, source, slimmed, work)
    return _one(options, request, source, slimmed, work)


def _one(options: ExportOptions, request: EngineRequest, source: ExportSource, slimmed: Slimmed, work: Workspace) -> Attempt:
    """One precision; of a quantised one the graph with the fewest parts kept that passes, or all quantised where none does."""
    graphs, names, precision = slim_onnx(slimmed.dense, slimmed.plan, request, work), request.names, request.graph
    if precision not in QUANTISED:
        return _measured(options, request, source, slimmed, graphs, work)
    typed, keep = graphs[names.onnx(request.typed)], tuple(options.keep_fp32)
    inputs = Quantised(graphs[names.slim], typed, slimmed.dense, precision, keep)
    quantised = QuantisedGraphs(inputs, quantiser_for(request.engine), source, work)

    def keeping(parts: Sequence[str]) -> Attempt:
        with_it = graphs | {names.onnx(precision): quantised.with_kept(parts)}
        return dataclasses.replace(_measured(options, request, source, slimmed, with_it, work), kept=list(parts))

    first = found = keeping([])
    if options.mixed == "none" or not _lost_by_quantisation(first):
        return first
    order = quantised.ranked()
    # Where the precision is chosen, one with most blocks kept is not worth the search: it is no faster than bf16.
    most = len(order) // 2 if options.chooses_precision else len(order) - 1
    for count in range(1, most + 1):
        work.reporter.say(f"{precision} fails the gate; keeping {', '.join(order[:count])}")
        found = keeping(order[:count])
        if found.parity.passed:
            return found
    return first


def _measured(
    options: ExportOptions,
    request: EngineRequest,
    source: ExportSource,
    slimmed: Slimmed,
    graphs: dict[str, Path],
    work: Workspace,
) -> Attempt:
    plan = slimmed.plan
    engine = built_engine(graphs[request.names.onnx(request.graph)], request, work)
    stages = answering_stages(source, plan, slimmed.fitted, BuiltGraphs(graphs, engine, request.names), work)
    measured = measured_logits(stages, source, options.batch_size, work)
    gate = Gate(max_top1_drop=options.max_top1_drop, rule=options.gate)
    parity = parity_report(measured, source.evaluation_record(), plan, request, engine, gate)
    return Attempt(request, graphs, engine, measured, parity)


def _lost_by_quantisation(found: Attempt) -> bool:
    """Whether only what is quantised fails the gate."""
    failed = [one.stage for one in found.parity.rungs if one.status in ("failed", "undecided")]
    return bool(failed) and {*failed} <= {*map(found.names.onnx, QUANTISED), found.names.engine}


def _fastest(
    options: ExportOptions, request: EngineRequest, source: ExportSource, slimmed: Slimmed, work: Workspace
) -> Attempt:
    """The fastest precision here that passes the gate; the default one where none does."""
    first = _one(options, request, source, slimmed, work)
    tried, left_out = {request.precision: first}, dict[Precision, str]()
    for precision in ENGINES[request.engine].precisions:
        if precision in tried:
            continue
        if not first.parity.passed:  # then no precision does
            left_out[precision] = f"{request.precision} does not pass"
            continue
        try:
            if precision in QUANTISED and (reason := why_not_quantised(request.engine)):
                raise Unavailable(reason)
            other = dataclasses.replace(request, backend=choose_backend(request.engine, (), precision), precision=precision)
            tried[precision] = _one(options, other, source, slimmed, work)
        except (Unavailable, InputRejected) as error:
            left_out[precision] = str(error)
    passed = {precision: found for precision, found in tried.items() if found.parity.passed}
    times = engine_times({one: found.timed for one, found in passed.items()}, work, "precisions") if len(passed) > 1 else {}
    chosen = request.precision
    for precision in passed:
        if times and times[precision] < _FASTER * times[chosen]:
            chosen = precision
    trials = [_trial(precision, found, times, chosen) for precision, found in tried.items()]
    trials += [PrecisionTrial(precision=name, status="not executed", note=note) for name, note in left_out.items()]
    work.reporter.say(f"precision: {chosen}")
    return dataclasses.replace(tried[chosen], trials=trials)


def _trial(precision: Precision, found: Attempt, times: Mapping[Precision, float], chosen: Precision) -> PrecisionTrial:
    last = found.parity.rungs[-1]
    ms, note = times.get(precision), ""
    if not found.parity.passed:
        note = next((one.note for one in found.parity.rungs if one.status in ("failed", "undecided")), "")
    elif ms is not None and precision != chosen:
        note = f"{ms / times[chosen]:.2f} times as long as {chosen} on this machine"
    return PrecisionTrial(
        precision=precision,
        status="passed" if found.parity.passed else "failed",
        ms=ms,
        batch=None if ms is None else TIMED_BATCH,
        top1_drop=last.top1_drop,
        kept=list(found.kept),
        chosen=precision == chosen,
        note=note[:4096],
    )
