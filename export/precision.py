"""Engines of one precision or of several: the fastest that passes the gate is taken; in INT8 few parts are kept as they are."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.engines.base import ENGINES, EngineResult
from export.engines.build import choose_backend
from export.int8 import Int8Graphs, why_no_int8
from export.logits import ENGINE, Measured, answering_stages, measured_logits
from export.parity import parity_report
from export.source import ExportSource, LazyModule
from export.stages import ONNX_SLIM, ONNX_STAGES, EngineRequest, Workspace, built_engine, slim_onnx
from patchslim.arrays import Array
from patchslim.choices import Precision
from patchslim.errors import InputRejected, Unavailable
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.plan import SlimPlan
from patchslim.records import StrictRecord, load_record, save_record
from patchslim.timing import interleaved, processor_name, timed
from validate.parity_records import Gate, ParityReport, PrecisionTrial

if TYPE_CHECKING:
    from export.options import ExportOptions

#: Rounds in which the engines of several precisions are timed in turn, and images of a batch.
_ROUNDS, _BATCH = 15, 8
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
    """An engine, the ONNX files behind it by stage, and what they answer; ``kept`` are the parts that INT8 leaves alone."""

    request: EngineRequest
    graphs: dict[str, Path]
    engine: EngineResult
    measured: Measured
    parity: ParityReport
    kept: Sequence[str] = ()
    trials: Sequence[PrecisionTrial] = field(default_factory=list)

    @property
    def served(self) -> Path:
        """The ONNX file that the engine was built from."""
        return self.graphs[ONNX_STAGES[self.request.graph]]


class _Times(StrictRecord):
    """Median times of a batch, milliseconds, by precision."""

    ms: dict[str, float]


def attempt(options: ExportOptions, request: EngineRequest, source: ExportSource, slimmed: Slimmed, work: Workspace) -> Attempt:
    """The engine in the precision that is asked for, or in the fastest that passes the gate; see ``ExportOptions``."""
    if options.chooses_precision:
        return _fastest(options, request, source, slimmed, work)
    return _one(options, request, source, slimmed, work)


def _one(options: ExportOptions, request: EngineRequest, source: ExportSource, slimmed: Slimmed, work: Workspace) -> Attempt:
    """One precision; of INT8 the graph with the fewest parts kept that passes, or all quantised where none does."""
    typed: Precision = "fp32" if request.graph == "int8" else request.graph
    graphs = slim_onnx(slimmed.dense, slimmed.plan, options.layout, typed, work)
    if request.graph != "int8":
        return _measured(options, request, source, slimmed, graphs, work)
    quantised = Int8Graphs(graphs[ONNX_SLIM], slimmed.dense, options.keep_fp32, source, work)

    def keeping(parts: Sequence[str]) -> Attempt:
        with_int8 = graphs | {ONNX_STAGES["int8"]: quantised.with_kept(parts)}
        return dataclasses.replace(_measured(options, request, source, slimmed, with_int8, work), kept=list(parts))

    first = found = keeping([])
    if options.mixed == "none" or not _lost_by_quantisation(first):
        return first
    order = quantised.ranked()
    # Where the precision is chosen, one with most blocks kept is not worth the search: it is no faster than bf16.
    most = len(order) // 2 if options.chooses_precision else len(order) - 1
    for count in range(1, most + 1):
        work.reporter.say(f"int8 fails the gate; keeping {', '.join(order[:count])}")
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
    engine = built_engine(graphs[ONNX_STAGES[request.graph]], request, work)
    stages = answering_stages(source, plan, slimmed.fitted, graphs, engine, work)
    measured = measured_logits(stages, source, options.batch_size, work)
    gate = Gate(max_top1_drop=options.max_top1_drop, rule=options.gate)
    parity = parity_report(measured, source.evaluation_record(), plan, options.layout, engine, gate)
    return Attempt(request, graphs, engine, measured, parity)


def _lost_by_quantisation(found: Attempt) -> bool:
    """Whether only what is quantised fails the gate."""
    failed = [one.stage for one in found.parity.rungs if one.status in ("failed", "undecided")]
    return bool(failed) and {*failed} <= {ONNX_STAGES["int8"], ENGINE}


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
            if precision == "int8" and (reason := why_no_int8()):
                raise Unavailable(reason)
            other = EngineRequest(request.engine, choose_backend(request.engine, (), precision), precision)
            tried[precision] = _one(options, other, source, slimmed, work)
        except (Unavailable, InputRejected) as error:
            left_out[precision] = str(error)
    passed = {precision: found for precision, found in tried.items() if found.parity.passed}
    times = _times(passed, work) if len(passed) > 1 else {}
    chosen = request.precision
    for precision in passed:
        if times and times[precision] < _FASTER * times[chosen]:
            chosen = precision
    trials = [_trial(precision, found, times, chosen) for precision, found in tried.items()]
    trials += [PrecisionTrial(precision=name, status="not executed", note=note) for name, note in left_out.items()]
    work.reporter.say(f"precision: {chosen}")
    return dataclasses.replace(tried[chosen], trials=trials)


def _trial(precision: Precision, found: Attempt, times: dict[str, float], chosen: Precision) -> PrecisionTrial:
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
        batch=None if ms is None else _BATCH,
        top1_drop=last.top1_drop,
        kept=list(found.kept),
        chosen=precision == chosen,
        note=note[:4096],
    )


def _times(attempts: dict[Precision, Attempt], work: Workspace) -> dict[str, float]:
    """Median milliseconds of a batch in each engine, all of them in turn on all cores, measured once."""
    folder = work.cache.path(
        "precisions",
        engines={name: [work.facts.digest(file) for file in found.engine.files] for name, found in attempts.items()},
        settings={name: found.engine.settings for name, found in attempts.items()},
        machine=(platform.node(), processor_name(), os.cpu_count()),
    )

    def build(part: Path) -> None:
        from patchslim.openvino_runner import OpenVinoRunner

        runs = []
        for found in attempts.values():
            xml, _ = (work.cache.verified(file) for file in found.engine.files)
            runner = OpenVinoRunner(xml, OpenVinoSettings.of_record(found.engine.settings))
            values = np.random.default_rng(0).standard_normal((_BATCH, *runner.image_shape)).astype(runner.dtype)
            runs.append(timed(functools.partial(runner.run, values), time.perf_counter))
        with work.reporter.bar("timing precisions", unit="rounds") as progress:
            rounds: Array = np.array(interleaved(runs, _ROUNDS, progress=progress))
        medians = np.median(rounds, axis=0) * 1e3
        save_record(part / "times.json", _Times(ms=dict(zip(attempts, medians.tolist(), strict=True))))

    work.cache.make(folder, build)
    return load_record(work.cache.verified(folder / "times.json"), _Times, "record of times").ms
