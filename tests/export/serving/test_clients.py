"""The clients are short and right: pictures are prepared bit for bit as they were for the model; labels are the classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.bundles import PREPROCESSING, SIZE
from tests.helpers.serving import bundle_with_serving, commands, rendered, script
from validate import check_bundle
from validate.bundle import load_manifest
from validate.images import preprocess
from validate.manifest import Weights
from validate.preprocessing import Preprocessing

SIZES = [(SIZE, SIZE), (31, 17), (17, 31), (5, 90), (3, 3), (64, 63)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_serving(tmp_path_factory.mktemp("serving") / "tiny")


def prepare_of(text: str) -> Any:
    """The function ``prepare`` of a rendered client."""
    names: dict[str, Any] = {"__file__": "classify.py", "__name__": "classify"}
    exec(compile(text, "classify.py", "exec"), names)
    return names["prepare"]


def specs() -> list[Preprocessing]:
    """Every mode of crop and every filter; crops that need padding; sides that differ; one channel."""
    fields = PREPROCESSING.model_dump(exclude={"rule"}) | {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    changes: list[dict[str, Any]] = [
        {"crop_mode": mode, "crop_pct": share} for mode in ("center", "squash", "border") for share in (0.875, 1.0, 1.4)
    ]
    changes += [{"interpolation": name} for name in ("nearest", "bilinear", "box", "hamming", "lanczos")]
    changes += [{"input_size": (3, 8, 12), "crop_mode": mode} for mode in ("center", "squash", "border")]
    changes += [{"input_size": (1, 8, 8), "mean": [0.4], "std": [0.3], "crop_mode": mode} for mode in ("center", "border")]
    return [Preprocessing(**(fields | change)).with_rule() for change in changes]


@pytest.mark.parametrize(
    "spec", specs(), ids=lambda spec: f"{spec.crop_mode}-{spec.crop_pct}-{spec.interpolation}-{spec.input_size}"
)
def test_pictures_are_prepared_bit_for_bit(spec: Preprocessing, bundle: Path) -> None:
    text = rendered(bundle, preprocessing=spec)["classify.py"]
    assert len(text.splitlines()) <= 40
    prepare, rng = prepare_of(text), np.random.default_rng(0)
    for width, height in SIZES:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for mode in ("RGB", "L", "RGBA"):
            try:
                preprocess(picture.convert(mode), spec)
            except ValueError:  # too thin for this rule: nothing is left of its shorter side
                assert spec.crop_mode == "border"
                continue
            found = prepare(picture.convert(mode))
            np.testing.assert_array_equal(found[0], preprocess(picture.convert(mode), spec))
            assert (found.dtype, found.flags["C_CONTIGUOUS"]) == (np.float32, True)


def test_without_a_rule_there_is_no_client_for_pictures(bundle: Path) -> None:
    fields = PREPROCESSING.model_dump(exclude={"rule"}) | {"input_size": (4, 8, 8), "mean": [0.5] * 4, "std": [0.5] * 4}
    files = rendered(bundle, preprocessing=Preprocessing(**fields))
    assert not [name for name in files if "classify" in name or "deepstream" in name]
    assert "classify" not in files["README.md"]
    assert "check_server.py" in files


def test_clients_and_tools_are_at_most_40_lines(bundle: Path) -> None:
    for name in ("classify.py", "classify.cpp", "check_server.py", "triton/make_repository.py"):
        assert len((bundle / "serving" / name).read_text().splitlines()) <= 40, name
    assert len((bundle / "serving/triton/python/model.py").read_text().splitlines()) <= 60


def test_a_picture_becomes_labels_in_this_process(bundle: Path) -> None:
    manifest, golden = load_manifest(bundle), np.load(bundle / "golden.npz")
    done = script(bundle / "serving/classify.py", "golden/1.png")
    assert done.returncode == 0, done.stderr
    logits, found = golden["slim_logits"][1], [line.rpartition(": ") for line in done.stdout.splitlines()]
    first = logits.argsort()[::-1][:3]
    assert [label for label, _, _ in found] == [manifest.labels[index] for index in first]
    np.testing.assert_allclose([float(value) for _, _, value in found], logits[first], atol=2e-4)
    assert check_bundle(bundle).exit_code == 0


def test_no_server_is_said_with_exit_code_4(bundle: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    done = script(bundle / "serving/check_server.py", "127.0.0.1:9", "--grpc")
    assert done.returncode == 4
    assert "127.0.0.1:9 does not answer for tiny" in done.stderr


@pytest.mark.parametrize(
    "label",
    ['quote " and \\ and ;', "two\nlines", "tab\tand\rreturn", "", " ", "größe 日本", "a\u2028b", "$(touch here)", "'; --"],
)
def test_any_label_stays_on_its_line(label: str, bundle: Path) -> None:
    labels = [label, *load_manifest(bundle).labels[1:]]
    files = rendered(bundle, labels=labels)
    lines = files["labels.txt"].splitlines()
    assert lines[1:] == labels[1:]
    assert len(files["deepstream/labels.txt"].split(";")) == len(labels)
    assert len(files["deepstream/labels.txt"].splitlines()) == 1
    assert lines[0] == (" ".join(label.split()) if label.strip() else "?") or lines[0] == label


def test_a_licence_and_a_model_stay_on_their_line(bundle: Path) -> None:
    weights = Weights(source="mine", license="MIT\n# Run this:\ncurl")
    files = rendered(bundle, weights=weights, model="vit\ntype: evil")
    assert "licence of the weights: MIT # Run this: curl.\n" in files["README.md"]
    assert not [name for name, text in files.items() if "\ntype: evil" in text]


def test_the_readme_tells_to_run_what_is_tested(bundle: Path) -> None:
    """Triton's are run by test_triton_server.py and test_triton.py, the others by test_export.py and here."""
    told = [" ".join(words) for words in commands((bundle / "serving" / "README.md").read_text(encoding="utf-8"))]
    assert [line for line in told if not line.startswith(("pip install", "docker run", "python -m graph_passes.run"))] == [
        "python serving/classify.py golden/0.png",
        "python serving/triton/make_repository.py ../repository",
        "python serving/triton/make_repository.py ../repository --backend python",
        "python serving/triton/serve.py ../repository",
        "python serving/check_server.py localhost:8000",
        "python serving/classify.py golden/0.png localhost:8000",
        "cp -r serving/deepstream ../deepstream",
    ]


def test_without_labels_the_classes_numbers_are_there(bundle: Path) -> None:
    assert rendered(bundle, labels=[])["labels.txt"].split() == ["0", "1", "2", "3", "4", "5"]


def test_the_same_manifest_gives_the_same_bytes(bundle: Path) -> None:
    assert rendered(bundle) == rendered(bundle)
    written = {path.relative_to(bundle / "serving").as_posix() for path in (bundle / "serving").rglob("*") if path.is_file()}
    assert written == rendered(bundle).keys()


def test_what_is_rendered_is_clean_code(bundle: Path) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.is_file():
        pytest.skip("ruff is not installed")
    files = [path for path in (bundle / "serving").rglob("*.py") if path.name != "classify.py"]  # that one is laid out closely
    command = [ruff, "check", "--no-cache", "--isolated", "--select", "B,E,F,W", "--line-length", "132", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_files_are_recorded_and_a_changed_one_is_refused(bundle: Path) -> None:
    recorded = {record.path for record in load_manifest(bundle).files}
    assert {f"serving/{name}" for name in rendered(bundle)} <= recorded
    path = bundle / "serving" / "triton" / "python" / "model.py"
    text = path.read_text()
    try:
        path.write_text(text + "import os\n")
        verdict = check_bundle(bundle)
        assert verdict.exit_code == 3
        assert "serving/triton/python/model.py" in "; ".join(verdict.faults)
    finally:
        path.write_text(text)
    json.loads((bundle / "manifest.json").read_text())
