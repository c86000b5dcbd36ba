"""A small model through the whole pipeline, for ONNX Runtime and for TensorRT-RTX: what is in the bundle, and is it sound?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from PIL import Image

from export import ExportOptions
from patchslim.errors import InputRejected
from patchslim.plan import load_plan
from slimming.search.budget import Budget
from tests.helpers.exports import CALIBRATION, DEPTH, EVALUATION, MODEL, TOKENS, read
from validate import check_bundle
from validate.engine_file import check_engine

if TYPE_CHECKING:
    from export.pipeline import Outcome

ENGINES = ["ort_export", "trt_export"]


@pytest.fixture(params=ENGINES)
def outcome(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_the_defaults() -> None:
    options = ExportOptions()
    assert (options.model, options.engine, options.weights, options.data) == ("vit_ti", "ort", "bundled", "digits")
    assert (options.calibration_images, options.eval_images) == (256, 2000)
    assert (options.budget, options.mode) == (Budget("macs-reduction", 0.45), "compact")
    assert (options.max_top1_drop, options.seed) == (0.2, 0)
    assert (options.engine_precision, options.layout, options.bundle) == ("fp32", "split", Path("bundles/vit_ti-ort"))
    trt = ExportOptions(model="deit_s", engine="trt")
    assert (trt.engine_precision, trt.layout, trt.bundle) == ("fp16", "packed", Path("bundles/deit_s-trt"))


def test_the_bundle_is_valid(outcome: Outcome) -> None:
    verdict = check_bundle(outcome.bundle)
    assert verdict.exit_code == 0, verdict.faults
    assert verdict.passed


def test_the_records_agree_with_the_plan(outcome: Outcome) -> None:
    manifest, parity = read(outcome.bundle / "manifest.json"), read(outcome.bundle / "parity.json")
    for record in (manifest, parity):
        macs = record["macs"]
        assert 0.45 <= macs["reduction"] < 0.6
        assert macs["reduction"] == pytest.approx(1 - macs["slim"] / macs["dense"])
        assert macs["layout"] == ("packed" if record["engine"]["backend"] == "tensorrt_rtx" else "split")
    plan = load_plan(outcome.bundle / "plan.json")
    assert (macs["dense"], macs["slim"]) == (plan.dense_macs(), plan.macs(macs["layout"]))
    assert manifest["tokens_per_block"] == plan.counts
    assert plan.counts[-1] == 1
    assert max(plan.counts) < TOKENS
    assert (plan.model, plan.origin.criterion, plan.origin.value) == (MODEL, "macs-reduction", 0.45)
    assert plan.weights is not None
    assert (plan.weights.file, plan.weights.fit) == (None, "closed-form")  # the ONNX files hold them
    assert manifest["rungs"] == parity["rungs"]
    assert manifest["evaluation"] == parity["evaluation"]
    assert manifest["evaluation"]["images"] == EVALUATION
    assert manifest["calibration"]["images"] == CALIBRATION
    assert manifest["calibration"]["share"] is None  # digits has splits of its own
    assert manifest["labels"] == list("0123456789")
    assert manifest["weights"]["source"] == "random"
    assert parity["gate"] == {"max_top1_drop": 100.0, "rule": "point"}
    assert parity["passed"]


def test_the_rungs_of_onnx_runtime(ort_export: Outcome) -> None:
    parity = read(ort_export.bundle / "parity.json")
    assert [rung["stage"] for rung in parity["rungs"]] == ["pytorch", "pytorch-slim", "onnx-slim", "engine"]
    original, slim, exported, engine = parity["rungs"]
    for rung in parity["rungs"]:
        assert (rung["images"], rung["status"]) == (EVALUATION, "passed")
        assert 0 <= rung["top1"] <= rung["top5"] <= 100
        assert rung["top1_drop"] == pytest.approx(original["top1"] - rung["top1"])
        assert 0 <= rung["agreement"] <= 100
    assert original["agreement"] == 100
    assert (slim["compared_to"], slim["tolerance"]) == ("pytorch", None)
    assert exported["compared_to"] == "pytorch-slim"
    assert 0 < exported["max_error"] < 1e-4 <= exported["tolerance"] < slim["max_error"]
    assert engine["max_error"] == 0
    assert "same run as onnx-slim" in engine["note"]
    record = parity["engine"]
    assert (record["backend"], record["targets"], record["precision"]) == ("onnxruntime", ["cpu"], "fp32")
    assert (record["fused_attentions"], record["files"], record["status"]) == (None, [], "passed")
    assert not (ort_export.bundle / "engine").exists()


def test_the_rungs_of_tensorrt(trt_export: Outcome, tmp_path: Path) -> None:
    parity = read(trt_export.bundle / "parity.json")
    stages = ["pytorch", "pytorch-slim", "onnx-slim", "onnx-slim-fp16", "engine"]
    assert [rung["stage"] for rung in parity["rungs"]] == stages
    typed, engine = parity["rungs"][-2:]
    assert (typed["images"], typed["status"], typed["compared_to"]) == (EVALUATION, "passed", "onnx-slim")
    assert 1e-6 < typed["max_error"] < typed["tolerance"]  # it was really computed in FP16
    assert (engine["images"], engine["top1"], engine["status"]) == (0, None, "not executed")
    assert engine["note"].startswith("built, not executed")
    record = parity["engine"]
    assert (record["backend"], record["targets"], record["precision"]) == ("tensorrt_rtx", ["sm89"], "fp16")
    assert (record["fused_attentions"], record["attentions"], record["status"]) == (DEPTH, DEPTH, "not executed")
    assert record["files"] == ["engine/model.fp16.sm89.engine"]
    engine_file = trt_export.bundle / record["files"][0]
    assert engine_file.stat().st_size > 10_000
    check_engine(engine_file, record["backend"])
    (tmp_path / "cut.engine").write_bytes(engine_file.read_bytes()[:-1])
    with pytest.raises(InputRejected, match="damaged engine of tensorrt_rtx"):
        check_engine(tmp_path / "cut.engine", record["backend"])
    layers = read(trt_export.bundle / "engine_layers.json")
    assert layers["sm89"]["fused_attentions"] == DEPTH
    kernels = [kernel for kernel in layers["sm89"]["kernels"] if kernel["type"] != "shape_call"]
    assert len(kernels) == trt_export.engine.kernels["sm89"]


def test_the_typed_graph_holds_half_precision_weights(trt_export: Outcome) -> None:
    kinds = {}
    for name in ("model.onnx", "model.fp16.onnx"):
        graph = onnx.load(trt_export.bundle / name).graph
        matrices = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
        kinds[name] = matrices - {onnx.TensorProto.INT64}  # tables of the tokens that are merged
        assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert kinds == {"model.onnx": {onnx.TensorProto.FLOAT}, "model.fp16.onnx": {onnx.TensorProto.FLOAT16}}


def test_golden_holds_real_images_and_both_models_logits(outcome: Outcome) -> None:
    with np.load(outcome.bundle / "golden.npz", allow_pickle=False) as golden:
        arrays = {name: golden[name] for name in golden.files}
    assert arrays["inputs"].shape == (8, 3, 48, 48)
    assert arrays["inputs"].std() > 0.1
    assert set(arrays["labels"]) <= set(range(10))
    original, slim = arrays["original_logits"], arrays["slim_logits"]
    assert original.shape == slim.shape == (8, 10)
    assert np.abs(original - slim).max() > 1e-3


def test_the_picture_has_one_panel_per_block(outcome: Outcome) -> None:
    with Image.open(outcome.bundle / "kept_patches.png") as image:
        image.load()
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    assert width == pytest.approx(2.1 * DEPTH * 110, abs=2)
    assert height == pytest.approx((2.35 + 0.45 + 0.4) * 110, abs=2)
    # Columns that hold anything but white below the titles: as many runs of them as there are panels.
    inked = (pixels[height // 3 : -height // 4] < 250).any(axis=(0, 2))
    assert int((np.diff(inked.astype(int)) == 1).sum()) == DEPTH
