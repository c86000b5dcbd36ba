"""The pipeline: from options to a published bundle, stage after stage."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.advice import Advice, what_would_pass
from export.begin import Begun, begin
from export.bisect import Bisection, bisect
from export.bundle import BundleContents, write_contents
from export.cache import StageDamaged
from export.engines.base import QUANTISED, EngineResult
from export.golden import golden_images
from export.latency.budget_stages import latency_record, latency_table
from export.logits import slimmed_module
from export.options import ExportOptions
from export.precision import Attempt, Slimmed
from export.publication import publish, recover
from export.report.page import ReportFacts
from export.report.stages import provenance, report_page, worst_images
from export.sbom import environment_sbom
from export.several import every_attempt
from export.speed import measured_speed
from export.stage_names import ALONE, ONNX_SLIM, StageNames
from export.stages import (
    Workspace,
    dense_onnx,
    find_plan,
    fitted_model,
    kept_patches,
)
from patchslim.errors import ParityFailed
from patchslim.plan import SlimPlan
from patchslim.records import load_record
from validate.explain import verdict_of
from validate.latency_sheet import LatencySheet
from validate.manifest import LatencyRecord
from validate.parity import stage_precision
from validate.parity_records import Macs, ParityReport, PrecisionTrial

#: The least share of the tensors between the kernels of an FP16 engine that must have 16 bits; those built so far have 0.8.
_LEAST_NARROW = 0.5
#: And of 8 bits, in an engine whose products are all quantised; the bundled model's has 0.5.
_LEAST_EIGHT_BIT = 0.25
#: Stages of one run that may be found damaged and made anew.
_REPAIRS = 3


@dataclass(frozen=True)
class Outcome:
    """A finished export; ``size`` is the bundle's, in bytes, ``engine`` the first of its engines, as ``attempts`` has them."""

    bundle: Path
    plan: SlimPlan
    macs: Macs
    parity: ParityReport
    engine: EngineResult
    size: int
    dense_onnx: Path
    latency: LatencyRecord | None
    advice: Advice | None = None  # where the gate failed
    bisections: Sequence[Bisection] = ()  # where they were asked for, or a stage's logits are too far off
    kept_parts: Sequence[str] = ()  # of the model, which INT8 leaves as they are
    trials: Sequence[PrecisionTrial] = ()  # where the precision was chosen by what was measured
    attempts: Sequence[Attempt] = ()


class GateFailed(ParityFailed):
    """A stage failed its gate; ``outcome`` is the export that is not published, its bundle in the work folder."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message, next_step="" if outcome.advice is None else str(outcome.advice))
        self.outcome = outcome


def export_bundle(options: ExportOptions) -> Outcome:
    """Run the whole export and publish the bundle. A finished stage that is found damaged on its disk is made anew.

    Raises ``PatchslimError``; in particular ``GateFailed`` where a stage fails its gate: then nothing is published, and the
    bundle stays in the work folder under a name that ends in ``.failed``.
    """
    begun = begin(options)
    work = begun.work
    recover(begun.options.bundle)
    with work.reporter.alive():
        for name, reason in begun.left_out.items():
            work.reporter.say(f"--engine all leaves out {name}: {reason}")
        for _ in range(_REPAIRS):
            try:
                return _export(begun)
            except StageDamaged as damaged:
                work.cache.discard(damaged.folder, "was changed on its disk")
        return _export(begun)


def _export(begun: Begun) -> Outcome:
    options, source, work = begun.options, begun.source, begun.work
    for request in begun.requests:
        work.reporter.say(f"engine: {request.backend.name} for {', '.join(request.backend.targets)}")
    table = latency_table(options, source, work)
    planned = find_plan(options, source, table, work)
    plan, fitted = planned.plan, fitted_model(planned, source, work)
    dense = dense_onnx(fitted, source.model, work)
    every = every_attempt(options, begun.requests, source, Slimmed(plan, fitted, dense), work)
    found, graphs, measured, parity = every.first, every.graphs, every.measured, every.parity
    engine = found.engine
    latency = latency_record(options, source, table, plan, dense, found.served, work)
    picture = kept_patches(plan, options.layout, measured.inputs[0], source.model, work)
    speed = measured_speed(dense, graphs[ONNX_SLIM], plan, options.layout, work) if options.measure_latency else None
    report = ReportFacts(
        name=options.bundle.name,
        plan=plan,
        parity=parity,
        engine=engine,
        others=[one.engine for one in every.attempts[1:]],
        labels=source.evaluation.labels,
        latency=None if speed is None else load_record(speed, LatencySheet, "latency sheet"),
        kept_patches=picture,
        worst=worst_images(source, parity.comparison, work),
        provenance=provenance(source, plan),
    )
    contents = BundleContents(
        name=options.bundle.name,
        model=source.model,
        labels=source.evaluation.labels,
        share=source.calibration.fraction if options.plan is None else None,
        plan=plan,
        graphs=graphs,
        attempts=every.attempts,
        measured=measured,
        parity=parity,
        picture=picture,
        sbom=environment_sbom(source.model, work),
        golden_images=golden_images(source, measured.inputs, work),
        latency_table=table,
        latency=latency,
        license=options.license or source.model.license,
        speed=speed,
        report=report_page(report, work),
    )
    missed = [fault for one in every.attempts for fault in (*missed_by(options, one.engine, one.names), *overflow(one, work))]
    passed = parity.passed and not missed
    folder = options.bundle if passed else options.work_folder / f"{options.bundle.name}.failed"
    publish(functools.partial(write_contents, contents), folder, options.sign if passed else None)
    work.facts.save()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    advice = None if parity.passed else what_would_pass(options, source, plan, parity, work)
    bisections: list[Bisection] = []
    if options.bisect or any(one.tolerance is not None and (one.max_error or 0) > one.tolerance for one in parity.rungs):
        work.reporter.say("comparing the stages block by block")
        slimmed = functools.partial(slimmed_module, source, plan, fitted)
        for one in every.attempts:
            known = [each.stage for each in bisections]
            runnable = {
                stage: path for stage, path in one.graphs.items() if stage_precision(stage) != "bf16"
            }  # in ONNX Runtime
            if not {*runnable} <= {*known}:
                found_here = bisect(dense, runnable, slimmed, measured.inputs)
                bisections += [each for each in found_here if each.stage not in known]
    outcome = Outcome(
        bundle=folder,
        plan=plan,
        macs=parity.macs,
        parity=parity,
        engine=engine,
        size=size,
        dense_onnx=dense,
        latency=latency,
        advice=advice,
        bisections=bisections,
        kept_parts=found.kept,
        trials=found.trials,
        attempts=every.attempts,
    )
    if not passed:
        faults = "; ".join(filter(None, [verdict_of(parity.rungs), *missed]))
        old = f"; {options.bundle} is an earlier one" if options.bundle.exists() else ""
        raise GateFailed(f"the bundle is not published{old}: {faults}. It stays, marked failed, in {folder}", outcome)
    return outcome


def unexecuted(options: ExportOptions, engine: EngineResult, stage: str) -> str:
    """What ``--require-executed`` has to say against ``engine``; "" where it ran, or need not have."""
    if engine.executed or not options.require_executed:
        return ""
    return f"{stage}: {engine.status}{f' ({engine.reason})' if engine.reason else ''}, and --require-executed asks for that"


def missed_by(options: ExportOptions, engine: EngineResult, names: StageNames = ALONE) -> list[str]:
    """What of the engine itself fails a gate: that it did not run, that attentions are not fused, that FP16 is none."""
    faults, tells = [unexecuted(options, engine, names.engine)], engine.backend in ("tensorrt", "tensorrt_rtx")
    if options.require_fused_attention and tells and (engine.fused_attentions or 0) < engine.attentions:
        found = (
            "it is not known which" if engine.fused_attentions is None else f"{engine.fused_attentions} of {engine.attentions}"
        )
        faults.append(f"{names.engine}: {found} attentions are one kernel each, and --require-fused-attention asks for all")
    share, eight = engine.narrow_share, engine.precision in QUANTISED
    least = _LEAST_EIGHT_BIT * engine.quantised if eight else _LEAST_NARROW
    if engine.precision != "fp32" and share is not None and share < least:
        found = f"{share:.0%} of the tensors between its kernels have {8 if eight else 16} bits"
        faults.append(f"{names.engine}: {found}: it is no {engine.precision} engine")
    return [fault for fault in faults if fault]


def overflow(attempt: Attempt, work: Workspace) -> list[str]:
    """Where a hidden value leaves FP16's range on the golden images, in a graph typed so: the layer, and what to do.

    The rung does not show it on a CPU: there ONNX Runtime computes FP16 in float32, and a GPU does not.
    """
    names, measured = attempt.names, attempt.measured
    if names.onnx("fp16") not in attempt.graphs:
        return []

    slim, images = attempt.graphs[names.slim], hashlib.sha256(measured.inputs.tobytes()).hexdigest()
    folder = work.cache.path("range", slim=work.facts.digest(slim), images=images)

    def build(part: Path) -> None:
        from graph_passes import load_model
        from graph_passes.fp16_range import fp16_range

        work.reporter.say("looking for values that FP16 cannot hold")
        found = fp16_range(load_model(work.cache.verified(slim)), measured.inputs, "the golden")
        said = [f"{found.described()}: use --precision bf16 or fp32"] if found.fits is False else []
        (part / "range.json").write_text(json.dumps(said), encoding="utf-8")

    work.cache.make(folder, build)
    faults: list[str] = json.loads(work.cache.read(folder / "range.json"))
    return faults
