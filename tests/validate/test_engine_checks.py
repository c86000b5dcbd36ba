"""The models of a bundle in the other engines of a machine: golden answers, times, accuracy, and engines that are not here."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchslim import cuda
from patchslim.errors import InputRejected, Unavailable, UsageError
from tests.helpers.bundles import PREPROCESSING, SIZE, make_bundle, only_for_onnxruntime, reseal, weight
from validate import check_bundle, load_manifest
from validate.engine_checks import Expected, Running, Trial, judged
from validate.engine_runs import EngineChoice, EngineRun, OnnxWeights, Subject
from validate.images import preprocess
from validate.latency_sweep import point
from validate.model import open_model
from validate.options import ValidateOptions
from validate.record_checks import read_golden
from validate.run import run

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
no_gpu = pytest.mark.skipif(cuda.local_target() is not None, reason="a GPU is visible")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("good") / "bundle")


def printed(capsys: pytest.CaptureFixture[str], options: ValidateOptions) -> tuple[int, Any]:
    code = run(options)
    return code, json.loads(capsys.readouterr().out)


@needs_openvino
def test_a_door_runs_every_engine_that_is_here(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(5)
    for number in range(4):
        picture = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
        right = int((preprocess(picture, PREPROCESSING).reshape(1, -1) @ weight()).argmax())
        place = tmp_path / f"class {(right + (number == 0)) % 6}"
        place.mkdir(exist_ok=True)
        picture.save(place / f"{number}.png")
    code, record = printed(capsys, ValidateOptions(good, images=tmp_path, threads=1, latency_seconds=0.01, json=True))
    assert (code, record["passed"]) == (0, True)
    assert [(one["engine"], one["file"]) for one in record["engines"]] == [
        ("ort", "model.onnx"),
        ("ort", "model-fp16.onnx"),
        ("openvino", "model.onnx"),
        ("openvino", "model-fp16.onnx"),
    ]
    assert [one["on"] for one in record["engines"]] == ["CPUExecutionProvider"] * 2 + ["CPU, f32"] * 2
    assert {one["accuracy"]["top1"] for one in record["engines"]} == {75.0}
    assert [one["accuracy"] for one in record["engines"][:2]] == record["measured"]
    assert (record["images"]["images"], record["images"]["folder"]) == (4, str(tmp_path))
    for one in record["engines"]:
        assert (one["status"], one["golden"]["images"]) == ("passed", 10)
        assert 0 < one["golden"]["max_error"] <= one["golden"]["tolerance"]
        assert [found["batch"] for found in one["latency"]] == (
            [1, 8, 32] if one["file"] == "model.onnx" else []
        )  # FP32 is served
        for found in one["latency"]:
            assert found["p50_ms"] <= (found["p90_ms"] or found["p50_ms"]) <= (found["p99_ms"] or float("inf"))
            assert found["runs"] >= 5
            assert found["images_per_second"] > 0
    checks = {check["name"] for check in record["checks"]}
    assert {"golden parity", "golden parity, openvino", "images", "images, openvino"} <= checks


@needs_openvino
def test_engines_are_chosen_by_name(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ValidateOptions(good, engine=("openvino",), latency_seconds=0, threads=1, json=True)
    code, record = printed(capsys, options)
    assert (code, {one["engine"] for one in record["engines"]}) == (0, {"openvino"})
    assert all(one["latency"] == [] for one in record["engines"])
    assert "golden parity" not in {check["name"] for check in record["checks"]}
    assert {one.engine for one in check_bundle(good, threads=1).engines} == {"ort"}  # from Python, unless others are asked for


@no_gpu
@pytest.mark.parametrize("engine", ["trt", "rtx"])
def test_an_engine_that_is_asked_for_and_not_here(good: Path, engine: Any) -> None:
    with pytest.raises(Unavailable, match=rf"--engine {engine}: .*(no visible GPU|install it: pip install)"):
        run(ValidateOptions(good, engine=(engine,)))


def test_openvino_that_is_not_installed(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else there(name))
    with pytest.raises(Unavailable, match=r"openvino is not installed; install it: pip install \"\.\[openvino\]\""):
        run(ValidateOptions(good, engine=("openvino",)))
    verdict = check_bundle(good, threads=1, engines=EngineChoice(None))
    assert verdict.passed
    assert {one.engine for one in verdict.engines} == {"ort"}


def with_engine_file(good: Path, bundle: Path, **stated_too: str) -> Path:
    """A copy of ``good`` whose engine is a file for full TensorRT on an sm87, of which also ``stated_too`` is said."""
    shutil.copytree(good, bundle)
    engine = b"ftrt" + bytes(60)
    (bundle / "engine").mkdir()
    (bundle / "engine" / "model.sm87.engine").write_bytes(engine)
    record = {"backend": "tensorrt", "version": "10.3", "targets": ["sm87"], "files": ["engine/model.sm87.engine"]} | stated_too
    for name in ("parity.json", "manifest.json"):
        stated = json.loads((bundle / name).read_text())
        stated["engine"].update(record)
        if name == "manifest.json":
            added = {"path": "engine/model.sm87.engine", "size": len(engine), "sha256": "0" * 64}
            stated["files"] = sorted([*stated["files"], added], key=lambda one: one["path"])
        (bundle / name).write_text(json.dumps(stated))
    reseal(bundle)
    return bundle


@no_gpu
def test_an_engine_file_that_nothing_here_can_run_is_named(good: Path, tmp_path: Path) -> None:
    bundle = with_engine_file(good, tmp_path / "bundle")
    verdict = check_bundle(bundle, threads=1, engines=EngineChoice(None))
    found = next(check for check in verdict.checks if check.name == "golden parity, tensorrt")
    assert (verdict.exit_code, found.status, found.subject) == (0, "not executed", "engine/model.sm87.engine")
    assert "the engine for sm87 did not run here: tensorrt is not installed" in found.detail


def test_an_engine_without_weights_says_where_they_come_from(good: Path, tmp_path: Path) -> None:
    bundle = with_engine_file(good, tmp_path / "bundle", weights_from="model.onnx")
    verdict = check_bundle(bundle, threads=1)
    found = next(check for check in verdict.checks if check.name == "engine")
    assert (verdict.exit_code, found.status) == (0, "passed")
    assert found.detail == "the header is tensorrt's; without weights, which it is given from model.onnx when it is loaded"
    with pytest.raises(InputRejected, match=r"weights_from: other\.onnx is no file of onnx"):
        with_engine_file(good, tmp_path / "other", weights_from="other.onnx")


def test_weights_are_those_of_the_bundle_or_none(good: Path, tmp_path: Path) -> None:
    bundle = with_engine_file(good, tmp_path / "bundle", weights_from="model.onnx")
    manifest = load_manifest(bundle)
    weights = OnnxWeights.of_engine(manifest.engine, bundle, manifest)
    assert weights == OnnxWeights(bundle, "model.onnx", manifest.files)
    assert OnnxWeights.of_engine(manifest.engine.model_copy(update={"weights_from": None}), bundle, manifest) is None
    built = manifest.engine.model_copy(update={"weights_from": "of-another.onnx"})
    with pytest.raises(InputRejected, match=r"has no of-another\.onnx, which the engine is to be given its weights from"):
        OnnxWeights.of_engine(built, bundle, manifest)
    task = {
        **weights.listed(),
        "path": manifest.engine.files[0],
        "backend": "tensorrt",
        "private": str(tmp_path),
        "cache": None,
    }
    with pytest.raises(Unavailable, match=r"tensorrt is not installed|no CUDA driver"):
        open_model(task | {"weights": weights.listed()})
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:-1] + b"x")
    with pytest.raises(InputRejected, match=r"model\.onnx: .*SHA-256"):
        open_model(task | {"weights": weights.listed()})


@needs_openvino
def test_a_graph_that_another_engine_does_not_take_is_no_fault_of_the_bundle(good: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(good, tmp_path / "bundle"))
    only_for_onnxruntime(bundle / "model.onnx")
    reseal(bundle)
    verdict = check_bundle(bundle, threads=1, engines=EngineChoice(None))
    assert verdict.passed
    found = next(check for check in verdict.checks if check.subject == "model.onnx" and check.name.endswith("openvino"))
    assert (found.status, "OpenVINO cannot load it" in found.detail) == ("not executed", True)
    asked = check_bundle(bundle, threads=1, engines=EngineChoice(("openvino",)))
    assert (asked.exit_code, "OpenVINO cannot load it" in asked.faults[0]) == (3, True)


def test_what_onnxruntime_finds_wrong_is_given_to_no_other(good: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(good, tmp_path / "bundle"))
    (bundle / "model.onnx").write_bytes(b"not onnx")
    reseal(bundle)
    verdict = check_bundle(bundle, threads=1, engines=EngineChoice(None))
    assert verdict.exit_code == 3
    assert not [check for check in verdict.checks if "openvino" in check.name]
    assert {one.engine for one in verdict.engines} == {"ort"}


def test_answers_that_are_too_far_are_exit_5(good: Path) -> None:
    manifest = load_manifest(good)
    runs: list[EngineRun] = []
    trial = Trial(good, manifest, read_golden(good, manifest), Running(threads=1), runs)
    subject = Subject("ort", good, "model.onnx", manifest.files)
    found = trial.run(subject, Expected(1e-9, 100.0))
    check = judged("golden parity", subject, found)
    assert (runs, found.status, check.exit_code) == ([found], "failed", 5)
    told = re.search(r"max error (\S+) of 1e-09 allowed", check.detail)
    assert told is not None
    assert float(told[1]) == pytest.approx(1e-5, abs=2e-6)  # ONNX Runtime's rounding on any processor is a part of it


@pytest.mark.parametrize(
    "options",
    [
        {"latency_seconds": -1.0},
        {"latency_seconds": float("nan")},
        {"built": Path("x")},
        {"build": True, "engine": ("ort",)},
        {"attestation": Path("a.json"), "build": True},
        {"attestation": Path("a.json"), "images": Path()},
        {"attestation": Path("a.json"), "engine": ("ort",)},
    ],
)
def test_options_that_contradict_each_other(good: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--"):
        run(ValidateOptions(good, **options))


def test_a_percentile_that_so_few_runs_cannot_show_is_none() -> None:
    few, some, many = (point(8, np.linspace(1e-3, 2e-3, runs), "wall") for runs in (5, 50, 200))
    assert (few.p50_ms, few.p90_ms, few.p99_ms) == (pytest.approx(1.5), None, None)
    assert (some.p90_ms, some.p99_ms) == (pytest.approx(1.9), None)
    assert (many.p90_ms, many.p99_ms) == (pytest.approx(1.9), pytest.approx(1.99))
    assert many.images_per_second == pytest.approx(8 / 1.5e-3)
    assert point(1, np.zeros(5), "gpu").p50_ms > 0
