"""The parity report: one rung per stage of an export, each compared with the stage that it was made from."""

from __future__ import annotations

from export.engines.base import EngineResult
from export.logits import ENGINE, PYTORCH, PYTORCH_SLIM, Measured
from export.stages import ONNX_FP16, ONNX_SLIM
from patchslim.choices import Layout
from patchslim.plan import SlimPlan
from validate import manifest as schema
from validate.parity import fp16_tolerance, fp32_tolerance, gate, not_executed, rung


def parity_report(
    measured: Measured,
    evaluation: schema.Evaluation,
    plan: SlimPlan,
    layout: Layout,
    engine: EngineResult,
    max_top1_drop: float,
) -> schema.ParityReport:
    """Compare each stage with the one that it was made from, and judge it by the gate: ``max_top1_drop`` points of top-1."""
    judged, passed = gate(ladder(measured, engine), max_top1_drop)
    dense, slim = plan.dense_macs(), plan.macs(layout)
    return schema.ParityReport(
        gate=schema.Gate(max_top1_drop=max_top1_drop),
        macs=schema.Macs(dense=dense, slim=slim, reduction=1 - slim / dense, layout=layout),
        rungs=judged,
        engine=schema.EngineRecord(
            backend=engine.backend,
            version=engine.version,
            targets=list(engine.targets),
            precision=engine.precision,
            fused_attentions=engine.fused_attentions,
            attentions=engine.attentions,
            files=[f"engine/{file.name}" for file in engine.files],
            status=judged[-1].status,
        ),
        evaluation=evaluation,
        passed=passed,
    )


def ladder(measured: Measured, engine: EngineResult) -> list[schema.Rung]:
    """The rungs, from the PyTorch original down to the engine, not judged yet."""
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
