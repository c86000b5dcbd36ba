"""The parity report: one rung per stage of an export, each compared with the stage that it was made from."""

from __future__ import annotations

import math

from export.engines.base import EngineResult
from export.logits import BATCH_SIZES, Measured
from export.stage_names import PRECISIONS, PYTORCH, PYTORCH_SLIM, StageNames, onnx_file
from export.stages import EngineRequest
from patchslim.choices import Layout, Precision
from patchslim.plan import SlimPlan
from validate.comparison import compare
from validate.parity import gate, logit_tolerance, not_executed, rung, stage_precision
from validate.parity_records import BatchCheck, Comparison, Evaluation, Gate, Macs, ParityReport, Rung


def parity_report(
    measured: Measured,
    evaluation: Evaluation,
    plan: SlimPlan,
    request: EngineRequest,
    engine: EngineResult,
    asked: Gate,
) -> ParityReport:
    """Compare each stage with the one that it was made from, and judge it by the gate that is ``asked`` for."""
    judged, passed = gate(ladder(measured, engine, request.names), asked.max_top1_drop, asked.rule)
    return ParityReport(
        gate=asked,
        comparison=comparison(measured, request.names),
        macs=macs_of(plan, request.layout),
        rungs=judged,
        engine=engine.record(
            [f"engine/{file.name}" for file in engine.files],
            judged[-1].status,
            onnx_file(request.names.onnx(request.graph)),
        ),
        evaluation=evaluation,
        passed=passed,
    )


def macs_of(plan: SlimPlan, layout: Layout) -> Macs:
    """What an image costs, dense and slim, where cuts are laid as ``layout``."""
    dense, slim = plan.dense_macs(), plan.macs(layout)
    return Macs(dense=dense, slim=slim, reduction=1 - slim / dense, layout=layout)


def ladder(measured: Measured, engine: EngineResult, names: StageNames) -> list[Rung]:
    """The rungs, from the PyTorch original down to the engine, not judged yet."""
    rungs = _rungs(measured, engine, names)
    return [_with_batches(one, measured, stage_precision(one.stage, engine.precision)) for one in rungs]


def comparison(measured: Measured, names: StageNames) -> Comparison:
    """Original and candidate, the last stage that answered."""
    stage = next(name for name in (names.engine, *reversed(names.graphs), PYTORCH_SLIM) if name in measured.logits)
    return compare(measured.logits[PYTORCH], measured.logits[stage], measured.targets, stages=(PYTORCH, stage))


def _with_batches(one: Rung, measured: Measured, precision: Precision) -> Rung:
    """``one`` with how far its answers depend on what is beside them in a batch."""
    if (error := measured.batch_errors.get(one.stage)) is None:
        return one
    tolerance = logit_tolerance(precision, measured.logits[one.stage])
    found = BatchCheck(sizes=list(BATCH_SIZES), max_error=None if math.isnan(error) else error, tolerance=tolerance)
    return one.model_copy(update={"batches": found})


def _rungs(measured: Measured, engine: EngineResult, names: StageNames) -> list[Rung]:
    logits, targets = measured.logits, measured.targets
    original = logits[PYTORCH]
    rungs = [rung(PYTORCH, original, targets)]
    chain = [(PYTORCH_SLIM, PYTORCH, None), (names.slim, PYTORCH_SLIM, logit_tolerance("fp32", logits[PYTORCH_SLIM]))]
    for precision, typed in zip(PRECISIONS[1:], names.graphs[1:], strict=True):
        if typed in logits:
            chain.append((typed, names.slim, logit_tolerance(precision, logits[names.slim])))
    for stage, before, tolerance in chain:
        rungs.append(rung(stage, logits[stage], targets, original, logits[before], compared_to=before, tolerance=tolerance))
    source = chain[-1][0]
    if engine.precision == "bf16" and engine.backend in ("tensorrt", "tensorrt_rtx") and names.onnx("bf16") not in logits:
        rungs.append(not_executed(names.onnx("bf16"), "ONNX Runtime has no bfloat16 on a CPU, and OpenVINO is not installed"))
    if engine.backend == "onnxruntime":
        note = f"ONNX Runtime on {', '.join(engine.targets)} is the engine: the same run as {source}"
        rungs.append(
            rung(names.engine, logits[source], targets, original, logits[source], compared_to=source, tolerance=0.0, note=note)
        )
    elif names.engine in logits:
        tolerance = logit_tolerance(engine.precision, logits[source])
        rungs.append(
            rung(names.engine, logits[names.engine], targets, original, logits[source], compared_to=source, tolerance=tolerance)
        )
    else:
        rungs.append(not_executed(names.engine, f"{engine.status}: {engine.reason}" if engine.reason else engine.status))
    return rungs
