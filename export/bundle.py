"""Assembling the hand-off folder and putting it in its place, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from export.cache import tool_versions
from export.engines.base import EngineResult
from export.onnx_export import INPUT, OUTPUT
from export.parity import FP16_TOLERANCE, fp32_tolerance
from export.stages import ONNX_FP16, ONNX_SLIM, PYTORCH, PYTORCH_SLIM, Stages
from patchslim.arrays import Array
from patchslim.errors import UsageError
from patchslim.plan import SlimPlan
from slimming.search.budget import LATENCY
from validate import manifest as schema
from validate.bundle import digest, record_files, write_parity
from validate.golden import Golden, write_golden
from validate.manifest import Manifest

MANIFEST = "manifest.json"


def check_place(folder: Path) -> None:
    """Raise ``UsageError`` unless ``folder`` is free, empty, or an earlier bundle that may be replaced."""
    if folder.name in ("", ".."):
        raise UsageError(f"--output {folder}: needs a folder of its own, with a name")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--output {folder}: is not a folder")
    if folder.is_dir() and (foreign := _foreign(folder)):
        raise UsageError(f"--output {folder}: holds {foreign}, which is not of a bundle; pass a new folder")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder}: {above} is not a folder that can be written")


def _foreign(folder: Path) -> str:
    """The first file in ``folder`` that an earlier bundle's manifest does not list, since it would be lost; "" if none is."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {MANIFEST, *(file["path"] for file in manifest["files"])} if "plan_digest" in manifest else set()
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    return next((name for name in names if name not in listed), "")


def publish(fill: Callable[[Path], Manifest], folder: Path) -> None:
    """Have ``fill`` make the bundle in a temporary folder beside ``folder``, write its manifest last, and rename it into place.

    An earlier bundle is replaced; when anything fails it stays, and nothing else is left behind.
    """
    from validate.bundle import write_manifest

    check_place(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        box = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be written: {error}") from error
    part, old = box / "new", box / "old"
    try:
        part.mkdir()
        write_manifest(part, fill(part))
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        if old.exists() and not folder.exists():  # failed or interrupted between the two renames
            old.rename(folder)
        shutil.rmtree(box, ignore_errors=True)


GOLDEN_IMAGES = 8


def fill_bundle(
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
    from export.kept_patches import draw_kept_patches
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
