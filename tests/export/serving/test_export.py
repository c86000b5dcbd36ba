"""What an export writes for serving: metadata in the ONNX files, and a folder whose printed commands work on that bundle."""

from __future__ import annotations

import configparser
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from export import export_bundle
from patchslim.files import digest
from tests.helpers.commands import door_here
from tests.helpers.exports import MODEL, read, tiny
from tests.helpers.serving import commands
from validate import check_bundle

if TYPE_CHECKING:
    from export.pipeline import Outcome


def metadata(path: Path) -> dict[str, str]:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)  # no key is there twice, among other things
    return {entry.key: entry.value for entry in model.metadata_props}


@pytest.fixture(params=["ort_export", "trt_export"])
def outcome(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_every_onnx_file_says_what_it_is(outcome: Outcome) -> None:
    manifest = read(outcome.bundle / "manifest.json")
    for record in manifest["onnx"]:
        said = metadata(outcome.bundle / record["path"])
        assert (said["model"], said["plan_sha256"]) == (MODEL, digest(outcome.bundle / "plan.json"))
        assert json.loads(said["labels"]) == manifest["labels"]
        normalization = json.loads(said["normalization"])
        assert normalization == {"divide_by": 255} | {key: manifest["preprocessing"][key] for key in ("mean", "std")}
        assert said["weights_sha256"] == manifest["weights"]["sha256"]
        assert "license" not in said  # random weights have none
        assert "Image.NominalPixelRange" not in said
    assert manifest["weights"]["license"] is None


def test_what_is_served_is_in_the_manifest(outcome: Outcome) -> None:
    listed = {record["path"] for record in read(outcome.bundle / "manifest.json")["files"]}
    there = {path.relative_to(outcome.bundle).as_posix() for path in (outcome.bundle / "serving").rglob("*") if path.is_file()}
    assert there
    assert there <= listed
    size = sum((outcome.bundle / name).stat().st_size for name in there)
    assert size < 64 << 10  # no copy of the model


def test_a_licence_that_is_given_is_passed_on(ort_export: Outcome, export_work: Path) -> None:
    bundle = export_bundle(tiny(export_work, "licensed", license="MIT")).bundle
    assert metadata(bundle / "model.onnx")["license"] == "MIT"
    assert read(bundle / "manifest.json")["weights"]["license"] == "MIT"
    assert "licence of the weights: MIT" in (bundle / "serving" / "README.md").read_text()
    assert check_bundle(bundle).exit_code == 0


def readme(bundle: Path) -> list[list[str]]:
    return commands((bundle / "serving" / "README.md").read_text(encoding="utf-8"))


def test_a_picture_is_named_as_the_readme_says(ort_export: Outcome, tmp_path: Path) -> None:
    (command,) = [
        words for words in readme(ort_export.bundle) if words[:2] == ["python", "serving/classify.py"] and len(words) == 3
    ]
    names: dict[str, Any] = {"__file__": str(ort_export.bundle / command[1]), "__name__": "classify"}
    exec(compile((ort_export.bundle / command[1]).read_text(), command[1], "exec"), names)
    golden = np.load(ort_export.bundle / "golden.npz")
    images = names["prepare"](Image.open(ort_export.bundle / command[2]))
    np.testing.assert_array_equal(images[0], golden["inputs"][0])
    np.testing.assert_allclose(names["logits"](images)[0], golden["slim_logits"][0], atol=1e-3)


def test_deepstream_is_given_pixels_and_gives_probabilities(outcome: Outcome, tmp_path: Path) -> None:
    bundle, target = outcome.bundle, tmp_path / "deepstream"
    shutil.copytree(bundle / "serving" / "deepstream", target)
    (command,) = [words for words in readme(bundle) if words[:3] == ["python", "-m", "graph_passes.run"]]
    config = configparser.ConfigParser()
    config.read(target / "config_infer.txt")
    nvinfer = config["property"]
    arguments = [str(bundle / word) if word.endswith(".onnx") and "/" not in word else word for word in command[1:]]
    arguments[-1] = str(target / nvinfer["onnx-file"])
    assert Path(command[-1]).name == nvinfer["onnx-file"]
    done = door_here([sys.executable, *arguments])
    assert done.returncode == 0, done.stderr
    manifest, golden = read(bundle / "manifest.json"), np.load(bundle / "golden.npz")
    mean, std = (np.array(manifest["preprocessing"][key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    pixels = np.rint((golden["inputs"] * std + mean) * 255).astype(np.float32)
    assert (pixels.min() >= 0, pixels.max() > 2, pixels.max() <= 255) == (True, True, True)
    session = onnxruntime.InferenceSession(target / nvinfer["onnx-file"], providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert (taken.type, taken.shape[1:]) == ("tensor(float)", [int(side) for side in nvinfer["infer-dims"].split(";")])
    (found,) = session.run([nvinfer["output-blob-names"]], {taken.name: pixels * float(nvinfer["net-scale-factor"])})
    wanted = np.exp(golden["slim_logits"] - golden["slim_logits"].max(1, keepdims=True))
    half = nvinfer["network-mode"] == "2"
    assert half == (manifest["precision"] == "fp16")
    np.testing.assert_allclose(found, wanted / wanted.sum(1, keepdims=True), atol=1e-2 if half else 1e-5)
    labels = (target / nvinfer["labelfile-path"]).read_text(encoding="utf-8").strip().split(";")
    assert labels == manifest["labels"]
    assert check_bundle(bundle).exit_code == 0
