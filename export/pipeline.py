"""From options to a published bundle: the stages in order, the gate, and what goes into the folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.bundle import check_place, publish
from export.cache import StageCache, tool_versions
from export.config import Options
from export.engines import EngineResult
from export.onnx_export import INPUT, OUTPUT
from export.stages import ENGINE, ONNX_FP16, ONNX_SLIM, PYTORCH, PYTORCH_SLIM, Stages
from patchslim.errors import ParityFailed
from patchslim.plan import SlimPlan
from patchslim.progress import Reporter
from slimming.search.budget import LATENCY
from slimming.session import open_session
from validate import manifest as schema
from validate.bundle import digest, record_files, write_parity
from validate.golden import Golden, write_golden
from validate.parity import gate, not_executed, rung

Array = npt.NDArray[Any]
#: Largest difference of a logit that FP16 may show against float32.
FP16_TOLERANCE = 0.1
GOLDEN_IMAGES = 8


@dataclass(frozen=True)
class Outcome:
    """A finished export."""

    bundle: Path
    plan: SlimPlan
    macs: schema.Macs
    parity: schema.ParityReport
    engine: EngineResult
    size: int  # bytes of the bundle
    dense_onnx: Path


class GateFailed(ParityFailed):
    """A stage failed its gate; ``outcome`` is the export that is not published, its bundle in the work folder."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


def fp32_tolerance(logits: Array) -> float:
    """Largest difference of a logit that ONNX Runtime in float32 may show: 1e-4, of the largest logit where that is above 1."""
    finite = np.abs(logits[np.isfinite(logits)])
    return 1e-4 * max(1.0, float(finite.max(initial=0.0)))


def export_bundle(options: Options) -> Outcome:
    """Run the whole export and publish the bundle.

    Raises ``PatchslimError``; in particular ``GateFailed`` when a stage fails its gate: then nothing is published, and the
    bundle stays in the work folder under a name that ends in ``.failed``.
    """
    options.check()
    check_place(options.bundle)
    reporter = Reporter()
    if options.engine == "trt":  # before anything slow: is there something to build with?
        from export.engines.tensorrt import choose_backend

        backend = choose_backend(options.targets, options.engine_precision)
        reporter.say(f"engine: {backend.name} for {', '.join(backend.targets)}")
    images = evaluation_images(options)
    session = open_session(options, images)
    stages = Stages(options, session, StageCache(options.work_folder), reporter)
    plan = stages.plan()
    fitted = stages.fitted(plan)
    dense = stages.dense_onnx(fitted)
    graphs = stages.slim_onnx(dense, plan)
    engine = stages.engine(graphs.get(ONNX_FP16, graphs[ONNX_SLIM]))
    logits, targets = stages.logits(images, plan, fitted, graphs, engine)
    parity = _parity(options, plan, engine, images, stages, logits, targets)

    def fill(folder: Path) -> schema.Manifest:
        return _fill(folder, stages, images, plan, graphs, engine, logits, targets, parity)

    folder = options.bundle if parity.passed else options.work_folder / f"{options.bundle.name}.failed"
    publish(fill, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    outcome = Outcome(folder, plan, parity.macs, parity, engine, size, dense)
    if not parity.passed:
        faults = "; ".join(f"{one.stage}: {one.note}" for one in parity.rungs if one.status == "failed")
        old = f"; {options.bundle} is an earlier one" if options.bundle.exists() else ""
        raise GateFailed(f"the bundle is not published{old}: {faults}. It stays, marked failed, in {folder}", outcome)
    return outcome


def describe(options: Options) -> dict[str, Any]:
    """What ``export_bundle`` would do with these options, and which of its slow stages are in the work folder already.

    Raises the ``PatchslimError`` that the run would meet before its first slow stage.
    """
    options.check()
    check_place(options.bundle)
    targets = ["cpu"]
    backend = "onnxruntime"
    if options.engine == "trt":
        from export.engines.tensorrt import choose_backend

        chosen = choose_backend(options.targets, options.engine_precision)
        backend, targets = chosen.name, list(chosen.targets)
    images = evaluation_images(options)
    session = open_session(options, images)
    stages = Stages(options, session, StageCache(options.work_folder), Reporter())
    if options.plan is not None or options.dense:
        stages.plan()  # read and compared with the model
        plan = str(options.plan or "dense")
    else:
        plan = "found already" if stages.plan_folder().is_dir() else "to be searched"
    return {
        "model": session.loaded.architecture,
        "weights": session.loaded.weights,
        "preprocessing": session.loaded.data_config,
        "calibration": session.calibration.describe(),
        "evaluation": images.describe(),
        "plan": plan,
        "backend": backend,
        "targets": targets,
        "precision": options.engine_precision,
        "work": str(options.work_folder),
        "bundle": str(options.bundle),
    }


def evaluation_images(options: Options) -> Any:
    """The held-out images that the options ask for."""
    from slimming.data.source import evaluation_set

    return evaluation_set(options.data, None if options.eval_images == "all" else options.eval_images)


def _parity(
    options: Options,
    plan: SlimPlan,
    engine: EngineResult,
    images: Any,
    stages: Stages,
    logits: dict[str, Array],
    targets: Array,
) -> schema.ParityReport:
    """One rung per stage, each compared with the stage that it was made from, and judged."""
    from slimming.data.source import fingerprint_of

    original = logits[PYTORCH]
    rungs = [rung(PYTORCH, original, targets)]
    chain = [(PYTORCH_SLIM, PYTORCH, None), (ONNX_SLIM, PYTORCH_SLIM, fp32_tolerance(logits[PYTORCH_SLIM]))]
    if ONNX_FP16 in logits:
        chain.append((ONNX_FP16, ONNX_SLIM, FP16_TOLERANCE))
    for stage, before, tolerance in chain:
        rungs.append(rung(stage, logits[stage], targets, original, logits[before], compared_to=before, tolerance=tolerance))
    source = chain[-1][0]
    if options.engine == "ort":
        note = f"ONNX Runtime on {', '.join(engine.targets)} is the engine: the same run as {source}"
        rungs.append(
            rung(ENGINE, logits[source], targets, original, logits[source], compared_to=source, tolerance=0.0, note=note)
        )
    elif ENGINE in logits:
        tolerance = FP16_TOLERANCE if engine.precision == "fp16" else fp32_tolerance(logits[source])
        rungs.append(rung(ENGINE, logits[ENGINE], targets, original, logits[source], compared_to=source, tolerance=tolerance))
    else:
        rungs.append(not_executed(ENGINE, f"{engine.status}: {engine.reason}" if engine.reason else engine.status))
    judged, passed = gate(rungs, options.max_top1_drop)
    dense, slim = plan.dense_macs(), plan.macs(options.layout)
    return schema.ParityReport(
        gate=schema.Gate(max_top1_drop=options.max_top1_drop),
        macs=schema.Macs(dense=dense, slim=slim, reduction=1 - slim / dense, layout=options.layout),
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
        evaluation=schema.Evaluation(
            data=images.address,
            split=f"{images.split} ({images.share})",
            images=len(images),
            fingerprint=fingerprint_of(images),
        ),
        passed=passed,
    )


def _fill(
    folder: Path,
    stages: Stages,
    images: Any,
    plan: SlimPlan,
    graphs: dict[str, Path],
    engine: EngineResult,
    logits: dict[str, Array],
    targets: Array,
    parity: schema.ParityReport,
) -> schema.Manifest:
    """Write every file of the bundle but the manifest, and return that."""
    from export.picture import draw_kept_patches
    from slimming.data.source import load_tensors

    options, loaded = stages.options, stages.session.loaded
    plan.save(folder / "plan.json")
    names = {ONNX_SLIM: "model.onnx", ONNX_FP16: "model.fp16.onnx"}
    for stage, path in graphs.items():
        shutil.copyfile(path, folder / names[stage])
    (folder / "engine").mkdir()
    for file in (*engine.files, *([engine.layers_file] if engine.layers_file else [])):
        shutil.copyfile(file, folder / "engine" / file.name if file in engine.files else folder / file.name)
    if not any((folder / "engine").iterdir()):
        (folder / "engine").rmdir()
    if options.plan is None and not options.dense and options.budget.criterion in LATENCY:
        shutil.copyfile(stages.latency_table(), folder / "latency_table.json")
    write_parity(folder, parity)
    first, _ = next(load_tensors(_first(images, GOLDEN_IMAGES), stages.session.transform, GOLDEN_IMAGES))
    count = len(first)
    write_golden(
        folder / "golden.npz",
        Golden(first.numpy(), targets[:count], logits[PYTORCH][:count], logits[PYTORCH_SLIM][:count]),
    )
    config = loaded.data_config
    pixels = first[0].numpy().transpose(1, 2, 0) * np.array(config["std"]) + np.array(config["mean"])
    draw_kept_patches(plan, options.layout, pixels, folder / "kept_patches.png")
    classes = int(loaded.module.num_classes)
    calibration = plan.origin.calibration
    return schema.Manifest(
        macs=parity.macs,
        evaluation=parity.evaluation,
        rungs=parity.rungs,
        engine=parity.engine,
        name=options.bundle.name,
        model=plan.model,
        model_args=json.loads(json.dumps(loaded.arguments)),
        weights=schema.Weights(source=loaded.weights, sha256=loaded.weights_sha256),
        plan_digest=digest(folder / "plan.json"),
        tools=tool_versions(),
        target={"engine": options.engine, "targets": list(engine.targets), "batch": list(engine.batch)},
        precision=options.engine_precision,
        inputs=[schema.TensorSpec(name=INPUT, dtype="float32", shape=["batch", *config["input_size"]])],
        outputs=[schema.TensorSpec(name=OUTPUT, dtype="float32", shape=["batch", classes])],
        preprocessing=schema.Preprocessing(
            input_size=tuple(config["input_size"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            mean=list(config["mean"]),
            std=list(config["std"]),
        ),
        labels=images.labels if len(images.labels) == classes else [],
        calibration=None
        if calibration is None
        else schema.CalibrationRecord(
            data=calibration.data,
            images=calibration.images,
            share=None if options.plan else stages.session.calibration.fraction,
            fingerprint=calibration.fingerprint,
        ),
        tokens_per_block=plan.counts,
        onnx=[
            schema.OnnxRecord(path="model.onnx", stage=ONNX_SLIM, max_error=fp32_tolerance(logits[PYTORCH_SLIM])),
            *(
                [schema.OnnxRecord(path="model.fp16.onnx", stage=ONNX_FP16, max_error=FP16_TOLERANCE, min_agreement=90.0)]
                if ONNX_FP16 in graphs
                else []
            ),
        ],
        files=record_files(folder),
    )


def _first(images: Any, count: int) -> Any:
    return dataclasses.replace(images, indices=images.indices[:count])
