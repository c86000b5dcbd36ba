"""The pipeline: from options to a published bundle, stage after stage."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.advice import Advice, what_would_pass
from export.bisect import Bisection, bisect
from export.bundle import BundleContents, write_contents
from export.cache import StageCache, StageDamaged
from export.engines.base import EngineResult
from export.engines.build import choose_backend
from export.golden import golden_images
from export.int8 import ensure_nncf
from export.logits import Measured, slimmed_module
from export.options import ExportOptions
from export.places import check_places
from export.precision import Slimmed, attempt
from export.publication import check_place, publish, recover
from export.report.page import ReportFacts
from export.report.stages import provenance, report_page, worst_images
from export.sbom import environment_sbom
from export.source import ExportSource
from export.speed import measured_speed
from export.stages import (
    ONNX_SLIM,
    ONNX_STAGES,
    EngineRequest,
    Workspace,
    dense_onnx,
    find_plan,
    fitted_model,
    kept_patches,
    known_latency_table,
    latency_record,
    latency_table,
    needs_latency_table,
    plan_folder,
)
from patchslim import cuda
from patchslim.errors import ParityFailed
from patchslim.plan import SlimPlan
from patchslim.progress import Reporter
from patchslim.records import load_record
from patchslim.targets import target_for
from validate.explain import verdict_of
from validate.latency_sheet import LatencySheet
from validate.manifest import LatencyRecord
from validate.parity_records import Macs, ParityReport, PrecisionTrial

#: The least share of the tensors between the kernels of an FP16 engine that must have 16 bits; those built so far have 0.8.
_LEAST_NARROW = 0.5
#: Stages of one run that may be found damaged and made anew.
_REPAIRS = 3


@dataclass(frozen=True)
class Outcome:
    """A finished export; ``size`` is the bundle's, in bytes."""

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
    request, source, work = begin(options)
    recover(options.bundle)
    with work.reporter.alive():
        for _ in range(_REPAIRS):
            try:
                return _export(options, request, source, work)
            except StageDamaged as damaged:
                work.cache.discard(damaged.folder, "was changed on its disk")
        return _export(options, request, source, work)


def _export(options: ExportOptions, request: EngineRequest, source: ExportSource, work: Workspace) -> Outcome:
    work.reporter.say(f"engine: {request.backend.name} for {', '.join(request.backend.targets)}")
    table = latency_table(options, source, work)
    planned = find_plan(options, source, table, work)
    plan, fitted = planned.plan, fitted_model(planned, source, work)
    dense = dense_onnx(fitted, source.model, work)
    found = attempt(options, request, source, Slimmed(plan, fitted, dense), work)
    request, graphs, engine, measured, parity = found.request, found.graphs, found.engine, found.measured, found.parity
    latency = latency_record(options, source, table, plan, dense, found.served, work)
    picture = kept_patches(plan, options.layout, measured.inputs[0], source.model, work)
    speed = measured_speed(dense, graphs[ONNX_SLIM], plan, options.layout, work) if options.measure_latency else None
    report = ReportFacts(
        name=options.bundle.name,
        plan=plan,
        parity=parity,
        engine=engine,
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
        request=request,
        engine=engine,
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
        kept_parts=list(found.kept),
        trials=list(found.trials),
    )
    missed = [*missed_by(options, engine), *overflow(graphs, measured, work)]
    passed = parity.passed and not missed
    folder = options.bundle if passed else options.work_folder / f"{options.bundle.name}.failed"
    publish(functools.partial(write_contents, contents), folder, options.sign if passed else None)
    work.facts.save()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    advice = None if parity.passed else what_would_pass(options, source, parity, work)
    bisections: list[Bisection] = []
    if options.bisect or any(one.tolerance is not None and (one.max_error or 0) > one.tolerance for one in parity.rungs):
        work.reporter.say("comparing the stages block by block")
        slimmed = functools.partial(slimmed_module, source, plan, fitted)
        runnable = {stage: path for stage, path in graphs.items() if stage != ONNX_STAGES["bf16"]}  # in ONNX Runtime
        bisections = bisect(dense, runnable, slimmed, measured.inputs)
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
    )
    if not passed:
        faults = "; ".join(filter(None, [verdict_of(parity.rungs), *missed]))
        old = f"; {options.bundle} is an earlier one" if options.bundle.exists() else ""
        raise GateFailed(f"the bundle is not published{old}: {faults}. It stays, marked failed, in {folder}", outcome)
    return outcome


def unexecuted(options: ExportOptions, engine: EngineResult) -> str:
    """What ``--require-executed`` has to say against ``engine``; "" where it ran, or need not have."""
    if engine.executed or not options.require_executed:
        return ""
    return f"engine: {engine.status}{f' ({engine.reason})' if engine.reason else ''}, and --require-executed asks for that"


def missed_by(options: ExportOptions, engine: EngineResult) -> list[str]:
    """What of the engine itself fails a gate: that it did not run, that attentions are not fused, that FP16 is none."""
    faults = [unexecuted(options, engine)]
    if options.require_fused_attention and (engine.fused_attentions or 0) < engine.attentions:
        found = (
            "it is not known which" if engine.fused_attentions is None else f"{engine.fused_attentions} of {engine.attentions}"
        )
        faults.append(f"engine: {found} attentions are one kernel each, and --require-fused-attention asks for all")
    share = engine.narrow_share
    if engine.precision != "fp32" and share is not None and share < _LEAST_NARROW:
        faults.append(
            f"engine: {share:.0%} of the tensors between its kernels have 16 bits: it is no {engine.precision} engine"
        )
    return [fault for fault in faults if fault]


def overflow(graphs: Mapping[str, Path], measured: Measured, work: Workspace) -> list[str]:
    """Where a hidden value leaves FP16's range on the golden images, in a graph typed so: the layer, and what to do.

    The rung does not show it on a CPU: there ONNX Runtime computes FP16 in float32, and a GPU does not.
    """
    if ONNX_STAGES["fp16"] not in graphs:
        return []

    slim, images = graphs[ONNX_SLIM], hashlib.sha256(measured.inputs.tobytes()).hexdigest()
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


def describe(options: ExportOptions) -> dict[str, object]:
    """What ``export_bundle`` would do with these options, and whether its plan is in the work folder already.

    Nothing is made or kept. Raises the ``PatchslimError`` that the run would meet before its first slow stage.
    """
    request, source, work = begin(options)
    if options.plan is not None or options.dense:
        find_plan(options, source, None, work)  # read and compared with the model
        plan = str(options.plan or "dense")
    else:
        table = known_latency_table(options, source, work)
        measured = table is not None or not needs_latency_table(options)
        found = measured and plan_folder(options, source, table, work).is_dir()
        plan = "found already" if found else "to be searched"
    return {
        "model": source.model.architecture,
        "weights": source.model.weights,
        "preprocessing": source.model.data_config,
        "calibration": source.calibration.describe(),
        "evaluation": source.evaluation.describe(),
        "plan": plan,
        "backend": request.backend.name,
        "targets": list(request.backend.targets),
        "precision": "auto" if options.chooses_precision else request.precision,
        "work": str(options.work_folder),
        "bundle": str(options.bundle),
    }


def begin(options: ExportOptions) -> tuple[EngineRequest, ExportSource, Workspace]:
    """Check what the options ask for before anything slow: the bundle's place, the engine, the model and the images."""
    options.check()
    check_places(options)
    check_place(options.bundle)
    options.check_inputs()
    reporter = Reporter()
    work = Workspace(StageCache(options.work_folder, reporter.say), reporter)
    work.cache.check()
    backend = choose_backend(options.engine, options.targets, options.engine_precision)
    if options.engine_precision == "int8":
        ensure_nncf()
    if options.require_executed and backend.ahead_of_time and target_for(cuda.local_target(), backend.targets) is None:
        raise ParityFailed(
            f"--require-executed: an engine for {', '.join(backend.targets)} cannot run on this machine; "
            "run this command on one with such a GPU, or leave the option out here and give it to validate.run there"
        )
    request = EngineRequest(options.engine, backend, options.engine_precision, options.batch_profile)
    return request, ExportSource(options, work.facts, reporter.say), work
