"""A complete small bundle: a linear classifier of 8 x 8 images as ONNX, its golden answers, its plan and its reports.

The tests damage it by hand, and ``seeds`` has what fuzzing mutates of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from patchslim.arrays import Array
from patchslim.files import digest
from patchslim.macs import Geometry
from patchslim.plan import Calibration, Origin, SlimPlan
from patchslim.records import save_record
from validate import parity
from validate.build_recipe import RECIPE, BuildRecipe, BuildSettings, ExpectedEngine, make_recipe
from validate.bundle import SUMS, load_manifest, record_files, write_manifest, write_parity, write_sums
from validate.comparison import compare
from validate.golden import Golden, write_golden
from validate.images import preprocess
from validate.manifest import CalibrationRecord, GoldenImage, Manifest, OnnxRecord, TensorSpec, Weights
from validate.parity_records import BatchCheck, EngineRecord, Evaluation, Gate, Macs, ParityReport
from validate.preprocessing import Preprocessing

SIZE, CLASSES, IMAGES, PICTURES = 8, 6, 10, 3
TOLERANCE = 2e-4
MODEL = "vit_tiny_patch16_224"
CALIBRATION = Calibration(data="digits", images=4, fingerprint="0" * 64)
PREPROCESSING = Preprocessing(
    input_size=(3, SIZE, SIZE), interpolation="bicubic", crop_pct=0.9, crop_mode="center", mean=[0.5] * 3, std=[0.25] * 3
).with_rule()


def weight(seed: int = 0) -> Array:
    """The classifier's (pixels, classes) matrix."""
    drawn = np.random.default_rng(seed).standard_normal((3 * SIZE * SIZE, CLASSES))
    return np.asarray(drawn.astype(np.float32) / 14)


def write_onnx(path: Path, matrix: Array, batch: str | int = "batch", external: str | None = None) -> None:
    """A one-layer ONNX classifier; ``external`` names a file for its weights."""
    tensor = numpy_helper.from_array(matrix, "weight")
    if external is not None:
        path.with_name("weights.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=external)
    kind = helper.np_dtype_to_tensor_dtype(matrix.dtype)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "weight"], ["logits"])],
        "classifier",
        [helper.make_tensor_value_info("image", kind, [batch, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", kind, [batch, CLASSES])],
        [tensor],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def write_pictures(folder: Path) -> Array:
    """Ten pictures, the first of which are saved as 0.png and so on; returns what ``PREPROCESSING`` makes of all."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    pictures = [Image.fromarray(rng.integers(0, 256, (12, 10 + row, 3), dtype=np.uint8)) for row in range(IMAGES)]
    for row, picture in enumerate(pictures[:PICTURES]):
        picture.save(folder / f"{row}.png")
    return np.stack([preprocess(picture, PREPROCESSING) for picture in pictures])


def plan() -> SlimPlan:
    """A plan of three blocks over one class token and a 2 x 2 grid."""
    return SlimPlan(
        model=MODEL,
        tokens=5,
        grid=(2, 2),
        prefix_tokens=1,
        pooling="token",
        head_tokens=[0],
        mode="compact",
        kept=[[0, 1, 2, 3, 4], [0, 2, 3], [0]],
        geometry=Geometry(embed_dim=8, mlp_hidden_dim=16, patch_macs=100, head_macs=48),
        origin=Origin(score="paper", criterion="manual", value=0.0, calibration=CALIBRATION),
    )


def write_recipe(folder: Path, spec: TensorSpec) -> BuildRecipe:
    """A recipe for the bundle's FP32 file, which has no attention."""
    onnx = next(file for file in record_files(folder) if file.path == "model.onnx")
    settings = BuildSettings(precision="fp32", tf32=False, workspace_mib=None, optimization_level=3, compute_capabilities=[])
    expected = ExpectedEngine(precision="fp32", attentions=0, fused_attentions=None)
    recipe = make_recipe(onnx=onnx, spec=spec, batch=(1, 4, 8), settings=settings, expected=expected, tools={"onnx": "1"})
    save_record(folder / RECIPE, recipe)
    return recipe


def make_bundle(folder: Path, **changes: Any) -> Path:
    """Write a bundle that passes every check, but for ``changes`` to its manifest's fields."""
    folder.mkdir(parents=True)
    inputs = write_pictures(folder / "golden")
    original = inputs.reshape(IMAGES, -1) @ weight()
    slim = original + np.float32(1e-5)
    slim_weight = weight()
    labels = original.argmax(axis=1)
    plan().save(folder / "plan.json")
    write_onnx(folder / "model.onnx", slim_weight)
    write_onnx(folder / "model-fp16.onnx", slim_weight.astype(np.float16))
    write_golden(folder / "golden.npz", Golden(inputs, labels, original, slim))
    p = plan()
    macs = Macs(dense=p.dense_macs(), slim=p.macs(), reduction=1 - p.macs() / p.dense_macs(), layout="split")
    rungs, passed = parity.gate(
        [
            parity.rung("pytorch", original, labels),
            parity.rung("pytorch-slim", slim, labels, original, original, compared_to="pytorch"),
            parity.rung(
                "onnx-slim", original, labels, original, slim, compared_to="pytorch-slim", tolerance=TOLERANCE
            ).model_copy(update={"batches": BatchCheck(sizes=[1, 2, 3], max_error=1e-6, tolerance=TOLERANCE)}),
            parity.not_executed("engine", "no GPU on this machine"),
        ],
        0.2,
    )
    engine = EngineRecord(
        backend="onnxruntime",
        version="1",
        targets=["cpu"],
        precision="fp32",
        fused_attentions=None,
        files=["model.onnx"],
        status="not executed",
    )
    results: dict[str, Any] = {
        "macs": macs,
        "rungs": rungs,
        "engine": engine,
        "evaluation": Evaluation(data="digits", split="test", images=IMAGES, fingerprint="0" * 64),
    }
    compared = compare(original, original, labels, stages=("pytorch", "onnx-slim"))
    write_parity(folder, ParityReport(gate=Gate(), comparison=compared, passed=passed, **results))
    fields: dict[str, Any] = {
        "name": "tiny",
        "model": MODEL,
        "weights": Weights(source="random"),
        "plan_digest": digest(folder / "plan.json"),
        "tools": {"onnx": onnx.__version__},
        "precision": "fp32",
        "inputs": [TensorSpec(name="image", dtype="float32", shape=["batch", 3, SIZE, SIZE])],
        "outputs": [TensorSpec(name="logits", dtype="float32", shape=["batch", CLASSES])],
        "preprocessing": PREPROCESSING,
        "calibration": CalibrationRecord.model_validate(CALIBRATION.model_dump()),
        "golden_images": [GoldenImage(path=f"golden/{row}.png", row=row) for row in range(PICTURES)],
        "labels": [f"class {number}" for number in range(CLASSES)],
        "tokens_per_block": p.counts,
        "onnx": [
            OnnxRecord(path="model.onnx", stage="onnx-slim", max_error=TOLERANCE),
            OnnxRecord(path="model-fp16.onnx", stage="onnx-slim-fp16", dtype="float16", max_error=0.05),
        ],
    }
    fields |= results | changes
    write_recipe(folder, fields["inputs"][0])
    write_manifest(folder, Manifest(**({"files": record_files(folder)} | fields)))
    return folder


def reseal(folder: Path, **changes: Any) -> None:
    """Write the manifest anew over the files as they are now, as someone who tampers carefully would."""
    fields = {name: getattr(load_manifest(folder), name) for name in Manifest.model_fields}
    if (folder / RECIPE).is_file():
        write_recipe(folder, changes.get("inputs", fields["inputs"])[0])
    fields |= {"files": record_files(folder), "plan_digest": digest(folder / "plan.json")}
    manifest = Manifest(**(fields | changes))
    write_manifest(folder, manifest)
    if (folder / SUMS).exists():
        write_sums(folder, manifest)
