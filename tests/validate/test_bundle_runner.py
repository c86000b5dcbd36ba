"""``open_runner``: a bundle's own engine where it runs here, else another; no file that is not the manifest's is loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchslim import cuda
from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.openvino_runner import save_ir
from tests.helpers.bundles import CLASSES, SIZE, make_bundle, reseal, weight, write_onnx
from validate import open_runner

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
no_gpu = pytest.mark.skipif(cuda.local_target() is not None, reason="a GPU is visible")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture(scope="module")
def golden(good: Path) -> Any:
    with np.load(good / "golden.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def state_engine(bundle: Path, **record: Any) -> None:
    """Say of a bundle that its engine is another."""
    for name in ("parity.json", "manifest.json"):
        stated = json.loads((bundle / name).read_text())
        stated["engine"].update(record)
        (bundle / name).write_text(json.dumps(stated))
    reseal(bundle)


@no_gpu
def test_the_bundles_own_engine_comes_first(good: Path, golden: Any) -> None:
    with open_runner(good, threads=1) as runner:
        assert (runner.engine, runner.path, runner.image_shape) == ("ort", "model.onnx", (3, SIZE, SIZE))
        logits = runner.infer(golden["inputs"])
    assert logits.shape == (len(golden["inputs"]), CLASSES)
    np.testing.assert_allclose(logits, golden["slim_logits"], atol=1e-4)
    many = np.tile(golden["inputs"], (3, 1, 1, 1))
    with open_runner(str(good)) as runner:
        np.testing.assert_allclose(runner.infer(many), np.tile(golden["slim_logits"], (3, 1)), atol=1e-4)


@needs_openvino
def test_an_ir_is_run_in_its_own_precision(good: Path, golden: Any, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(good, tmp_path / "bundle"))
    (bundle / "engine").mkdir()
    save_ir(bundle / "model.onnx", bundle / "engine" / "model.xml")
    reseal(bundle)
    files = ["engine/model.xml", "engine/model.bin"]
    state_engine(bundle, backend="openvino", files=files, settings={"INFERENCE_PRECISION_HINT": "f32"})
    with open_runner(bundle, threads=1) as runner:
        assert (runner.engine, runner.path) == ("openvino", "engine/model.xml")
        np.testing.assert_allclose(runner.infer(golden["inputs"]), golden["slim_logits"], atol=1e-4)
    with open_runner(bundle, "ort") as runner:
        assert (runner.engine, runner.path) == ("ort", "model.onnx")


@needs_openvino
@no_gpu
def test_where_the_engine_is_for_a_gpu_another_runs(good: Path, golden: Any, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(good, tmp_path / "bundle"))
    (bundle / "engine").mkdir()
    (bundle / "engine" / "model.sm87.engine").write_bytes(b"ftrt" + bytes(60))
    reseal(bundle)
    state_engine(bundle, backend="tensorrt", targets=["sm87"], files=["engine/model.sm87.engine"])
    with open_runner(bundle) as runner:
        assert (runner.engine, runner.path) == ("openvino", "model.onnx")
        np.testing.assert_allclose(runner.infer(golden["inputs"]), golden["slim_logits"], atol=1e-4)
    with pytest.raises(Unavailable, match="nothing of it runs here: it has no engine for trt and a machine without a GPU"):
        open_runner(bundle, "trt")


def test_no_other_file_is_loaded(good: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(good, tmp_path / "bundle"))
    write_onnx(bundle / "model.onnx", weight(1))
    with pytest.raises(InputRejected, match=r"model\.onnx: its SHA-256 is not the one in manifest\.json"):
        open_runner(bundle, "ort")
    (bundle / "manifest.json").write_text("{}")
    with pytest.raises(InputRejected, match=r"manifest\.json"):
        open_runner(bundle)


def test_what_does_not_fit_is_refused(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_runner(good, "ort", 1) as runner, pytest.raises(InputRejected, match=r"takes images of shape \(batch, 3, 8, 8\)"):
        runner.infer(np.zeros((2, 3, 9, 9), dtype=np.float32))
    with pytest.raises(UsageError, match="engine tvm: must be one of ort, openvino, trt, rtx"):
        open_runner(good, "tvm")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="hint fast: must be one of latency, throughput, or None"):
        open_runner(good, hint="fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads 0: must be at least 1"):
        open_runner(good, threads=0)
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("onnxruntime", "openvino") else there(name))
    with pytest.raises(Unavailable, match=r"ort: onnxruntime is not installed; .*openvino: openvino is not installed"):
        open_runner(good)
