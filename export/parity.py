"""The parity report: one rung per stage of an export, each compared with the stage that it was made from."""

from __future__ import annotations

import math

from export.engines.base import EngineResult
from export.logits import BATCH_SIZES, ENGINE, PYTORCH, PYTORCH_SLIM, Measured
from export.stages import ONNX_FP16, ONNX_SLIM
from patchslim.choices import Layout
from patchslim.plan import SlimPlan
from validate import manifest as schema
from validate.comparison import compare
from validate.parity import fp16_tolerance, fp32_tolerance, gate, not_executed, rung


def parity_report(
    measured: Measured,
    evaluation: schema.Evaluation,
    plan: SlimPlan,
    layout: Layout,
    engine: EngineResult,
    asked: schema.Gate,
) -> schema.ParityReport:
    """Compare each stage with the one that it was made from, and judge it by the gate that is ``asked`` for."""
    judged, passed = gate(ladder(measured, engine), asked.max_top1_drop, asked.rule)
    dense, slim = plan.dense_macs(), plan.macs(layout)
    return schema.ParityReport(
        gate=asked,
        comparison=comparison(measured),
        macs=schema.Macs(dense=dense, slim=slim, reduction=1 - slim / dense, layout=layout),
        rungs=judged,
        engine=engine.record([f"engine/{file.name}" for file in engine.files], judged[-1].status),
        evaluation=evaluation,
        passed=passed,
    )


def ladder(measured: Measured, engine: EngineResult) -> list[schema.Rung]:
    """The rungs, from the PyTorch original down to the engine, not judged yet."""
    fp16 = {ONNX_FP16} | ({ENGINE} if engine.precision == "fp16" else set())
    return [_with_batches(one, measured, fp16=one.stage in fp16) for one in _rungs(measured, engine)]


def comparison(measured: Measured) -> schema.Comparison:
    """Original and candidate, the last stage that answered."""
    stage = next(name for name in (ENGINE, ONNX_FP16, ONNX_SLIM, PYTORCH_SLIM) if name in measured.logits)
    return compare(measured.logits[PYTORCH], measured.logits[stage], measured.targets, stages=(PYTORCH, stage))


def _with_batches(one: schema.Rung, measured: Measured, *, fp16: bool) -> schema.Rung:
    """``one`` with how far its answers depend on what is beside them in a batch."""
    if (error := measured.batch_errors.get(one.stage)) is None:
        return one
    tolerance = (fp16_tolerance if fp16 else fp32_tolerance)(measured.logits[one.stage])
    found = schema.BatchCheck(sizes=list(BATCH_SIZES), max_error=None if math.isnan(error) else error, tolerance=tolerance)
    return one.model_copy(update={"batches": found})


def _rungs(measured: Measured, engine: EngineResult) -> list[schema.Rung]:
    logits, targets = measured.logits, measured.targets
    original = logits[PYTORCH]
    rungs = [rung(PYTORCH, original, targets)]
    chain = [(PYTORCH_SLIM, PYTORCH, None), (ONNX_SLIM, PYTORCH_SLIM, fp32_tolerance(logits[PYTORCH_SLIM]))]
    if ONNX_FP16 in logits:
        chain.append((ONNX_FP16, ONNX_SLIM, fp16_tolerance(logits[ONNX_SLIM])))
    for stage, before, tolerance in chain:
        rungs.append(rung(stage, logits[stage], targets, original, logits[before], compared_to=before, tolerance=tolerance))
    source = chain[-1][0]
    if engine.backend == "onnxruntime":
        note = f"ONNX Runtime on {', '.join(engine.targets)} is the engine: the same run as {source}"
        rungs.append(
            rung(ENGINE, logits[source], targets, original, logits[source], compared_to=source, tolerance=0.0, note=note)
        )
    elif ENGINE in logits:
        tolerance = (fp16_tolerance if engine.precision == "fp16" else fp32_tolerance)(logits[source])
        rungs.append(rung(ENGINE, logits[ENGINE], targets, original, logits[source], compared_to=source, tolerance=tolerance))
    else:
        rungs.append(not_executed(ENGINE, f"{engine.status}: {engine.reason}" if engine.reason else engine.status))
    return rungs
