"""The contents of the hand-off folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.cache import copy_verified, tool_versions
from export.engines.base import QUANTISED, BuildSettings, EngineResult
from export.golden import preprocessing
from export.logits import Measured
from export.onnx_export import INPUT, OUTPUT
from export.precision import Attempt
from export.serving.render import write_serving
from export.source import ModelFacts
from export.stage_names import PYTORCH, PYTORCH_SLIM, onnx_file
from graph_passes.onnx_io.metadata import NORMALIZATION, add_metadata
from patchslim.files import digest
from patchslim.plan import SlimPlan
from patchslim.records import save_record
from patchslim.targets import PORTABLE
from validate import manifest as schema
from validate.build_recipe import RECIPE, ExpectedEngine, make_recipe
from validate.build_recipe import BuildSettings as RecipeSettings
from validate.bundle import record_files, write_parity
from validate.golden import Golden, write_golden
from validate.parity import MIN_AGREEMENT, logit_tolerance, stage_precision
from validate.parity_records import ParityReport


@dataclass(frozen=True)
class BundleContents:
    """Everything that a bundle says or holds; ``graphs`` are ONNX files by stage name.

    ``license`` is that of the weights; None where it is not known.
    ``share`` is the part of an undivided data set that calibrated, ``labels`` are the class names of the held-out images,
    ``golden_images`` are PNG files by row of the golden inputs. ``latency_table`` and ``latency`` are there where the plan was
    solved on one, ``speed`` where the graphs were timed; ``report`` is the page. ``attempts`` are the engines, the one to be
    served first.
    """

    name: str
    model: ModelFacts
    labels: list[str]
    share: float | None
    plan: SlimPlan
    graphs: dict[str, Path]
    attempts: Sequence[Attempt]
    measured: Measured
    parity: ParityReport
    picture: Path
    sbom: Path
    golden_images: dict[int, Path]
    latency_table: Path | None
    latency: schema.LatencyRecord | None
    license: str | None
    speed: Path | None
    report: Path

    @property
    def first(self) -> Attempt:
        """The engine that is served."""
        return self.attempts[0]


def write_contents(contents: BundleContents, folder: Path) -> schema.Manifest:
    """Write every file of the bundle but the manifest into ``folder``, and return that."""
    _in_bundle(contents.plan).save(folder / "plan.json")
    about = _metadata(contents, digest(folder / "plan.json"))
    for stage, path in contents.graphs.items():
        copy_verified(path, folder / onnx_file(stage))
        add_metadata(folder / onnx_file(stage), about)
    for attempt in contents.attempts:
        _copy_engine(attempt.engine, folder)
    if contents.latency_table is not None:
        copy_verified(contents.latency_table, folder / "latency_table.json")
    if contents.speed is not None:
        copy_verified(contents.speed, folder / contents.speed.name)
    copy_verified(contents.report, folder / contents.report.name)
    copy_verified(contents.picture, folder / "kept_patches.png")
    copy_verified(contents.sbom, folder / contents.sbom.name)
    write_parity(folder, contents.parity)
    write_golden(folder / "golden.npz", _golden(contents.measured))
    for row, path in contents.golden_images.items():
        (folder / "golden").mkdir(exist_ok=True)
        copy_verified(path, folder / "golden" / f"{row}.png")
    _write_recipe(contents, folder)
    manifest = _manifest(contents, folder)
    write_serving(manifest, folder)
    served = [one.model_copy(update={"path": f"serving/{one.path}"}) for one in record_files(folder / "serving")]
    return manifest.model_copy(update={"files": sorted([*manifest.files, *served], key=lambda one: one.path)})


def _metadata(contents: BundleContents, plan_sha256: str) -> dict[str, str]:
    """What the ONNX files say of themselves: a file travels alone more often than in its folder."""
    model = contents.model
    spec = preprocessing(model)
    labels = contents.labels if len(contents.labels) == model.classes else []
    said = {
        "model": contents.plan.model,
        "labels": json.dumps(labels, ensure_ascii=False) if labels else "",
        NORMALIZATION: json.dumps({"divide_by": 255, "mean": spec.mean, "std": spec.std}),
        "license": contents.license or "",
        "plan_sha256": plan_sha256,
        "weights_sha256": model.weights_sha256,
    }
    return {key: value for key, value in said.items() if value}


def _write_recipe(contents: BundleContents, folder: Path) -> None:
    """How a device builds a TensorRT engine by itself: of what the bundle's was built from, or of the file that is served."""
    attempt = next((one for one in contents.attempts if one.request.engine == "trt"), contents.first)
    engine, request = attempt.engine, attempt.request
    quantised_for_others = request.graph in QUANTISED and request.engine != "trt"  # TensorRT would lose its fused attentions
    precision = "fp32" if quantised_for_others else request.graph
    name = onnx_file(attempt.names.onnx(precision))
    served = folder / name
    told, ahead_of_time = request.settings or BuildSettings.default(precision), request.backend.ahead_of_time
    recipe = make_recipe(
        onnx=schema.FileRecord(path=name, size=served.stat().st_size, sha256=digest(served)),
        spec=_input(contents.model),
        batch=engine.batch,
        settings=RecipeSettings(
            precision=precision,
            tf32=told.tf32,
            workspace_mib=None if told.workspace is None else told.workspace >> 20,
            optimization_level=told.optimization_level,
            refit=told.refit,
            strip_weights=told.strip_weights,
            compute_capabilities=[target for target in engine.targets if target != PORTABLE] if ahead_of_time else [],
        ),
        expected=ExpectedEngine(precision=precision, attentions=engine.attentions, fused_attentions=engine.fused_attentions),
        tools=tool_versions(),
        profiles=request.profiles,
    )
    save_record(folder / RECIPE, recipe)


def _input(model: ModelFacts) -> schema.TensorSpec:
    return schema.TensorSpec(name=INPUT, dtype="float32", shape=["batch", *model.data_config["input_size"]])


def _in_bundle(plan: SlimPlan) -> SlimPlan:
    """``plan`` without the name of its fitted weights, which a bundle has in its ONNX files alone."""
    weights = plan.weights and plan.weights.model_copy(update={"file": None})
    return plan.model_copy(update={"weights": weights})


def _copy_engine(engine: EngineResult, folder: Path) -> None:
    if engine.files:
        (folder / "engine").mkdir(exist_ok=True)
    for file in engine.files:
        copy_verified(file, folder / "engine" / file.name)
    if engine.layers_file is not None:
        copy_verified(engine.layers_file, folder / engine.layers_file.name)


def _golden(measured: Measured) -> Golden:
    count = len(measured.inputs)
    original, slim = (measured.logits[stage][:count] for stage in (PYTORCH, PYTORCH_SLIM))
    return Golden(measured.inputs, measured.targets[:count], original, slim)


def _manifest(contents: BundleContents, folder: Path) -> schema.Manifest:
    model, plan, parity, request, engine = (
        contents.model,
        contents.plan,
        contents.parity,
        contents.first.request,
        contents.first.engine,
    )
    calibration = plan.origin.calibration
    return schema.Manifest(
        macs=parity.macs,
        evaluation=parity.evaluation,
        rungs=parity.rungs,
        engine=parity.engine,
        engines=parity.engines,
        name=contents.name,
        model=plan.model,
        model_args=model.arguments,
        weights=schema.Weights(source=model.weights, sha256=model.weights_sha256, license=contents.license),
        plan_digest=digest(folder / "plan.json"),
        tools=tool_versions(),
        target={"engine": request.engine, "targets": list(engine.targets), "batch": list(engine.batch)},
        precision=request.precision,
        inputs=[_input(model)],
        outputs=[schema.TensorSpec(name=OUTPUT, dtype="float32", shape=["batch", model.classes])],
        preprocessing=preprocessing(model),
        labels=contents.labels if len(contents.labels) == model.classes else [],
        calibration=None
        if calibration is None
        else schema.CalibrationRecord(
            data=calibration.data,
            images=calibration.images,
            share=contents.share,
            fingerprint=calibration.fingerprint,
        ),
        latency=contents.latency,
        precision_trials=list(contents.first.trials),
        kept_parts=list(contents.first.kept),
        golden_images=[schema.GoldenImage(path=f"golden/{row}.png", row=row) for row in contents.golden_images],
        tokens_per_block=plan.counts,
        onnx=_onnx_records(contents),
        files=record_files(folder),
    )


def _onnx_records(contents: BundleContents) -> list[schema.OnnxRecord]:
    logits = contents.measured.logits[PYTORCH_SLIM]
    return [
        schema.OnnxRecord(
            path=onnx_file(stage),
            stage=stage,
            max_error=None if precision == "bf16" else logit_tolerance(precision, logits),  # no kernels in ONNX Runtime
            min_agreement=MIN_AGREEMENT[precision],
        )
        for stage in contents.graphs
        for precision in [stage_precision(stage)]
    ]
