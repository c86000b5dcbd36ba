"""The door of ``validate``, run as a user runs it: without torch, with images, as JSON, with every exit code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from patchslim.errors import InputRejected, Unavailable, UsageError
from tests.helpers.bundles import PREPROCESSING, SIZE, Answer, make_bundle, reseal, weight, write_onnx
from tests.helpers.commands import door_here
from tests.helpers.validate_process import BLOCKED, run
from validate import run as door
from validate.images import list_images, preprocess
from validate.preprocessing import Interpolation, Preprocessing

#: ONNX Runtime alone, and no times: tests/validate/test_engines.py is about the others.
ORT: dict[str, Any] = {"threads": 1, "engine": ("ort",), "latency_seconds": 0.0}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(31, 47), (64, 40), (50, 50), (9, 120), (7, 5)]
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def here(*arguments: object) -> Answer:
    """The command in the test's own process, with ONNX Runtime alone, timing nothing."""
    options = ["--engine", "ort", "--latency-seconds", "0"]
    done = door_here([sys.executable, "-m", "validate.run", *map(str, arguments), *options])
    return Answer(done.returncode, done.stdout, done.stderr)


def test_without_torch(good: Path) -> None:
    answer = run(good, "--threads", 1, "--latency-seconds", 0)
    assert answer.code == 0, answer.err
    for word in ("pytorch-slim", "golden parity", "model-fp16.onnx", "exit code 0"):
        assert word in answer.out


def test_as_json_with_images(good: Path, photographs: list[Image.Image], tmp_path: Path) -> None:
    for number, image in enumerate(photographs):
        folder = tmp_path / "images" / f"class {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    answer = here(good, "--json", "--images", tmp_path / "images", "--batch", 2, "--threads", 1)
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)
    assert record["passed"]
    assert [rung["stage"] for rung in record["measured"]] == ["onnx-slim", "onnx-slim-fp16"]
    tensors = np.stack([preprocess(image, PREPROCESSING) for image in photographs])
    right = (tensors.reshape(len(tensors), -1) @ weight()).argmax(axis=1) == np.arange(len(photographs)) % 3
    assert record["measured"][0]["top1"] == pytest.approx(100 * right.mean())
    assert record["measured"][0]["images"] == len(photographs)


def test_exit_codes(good: Path, tmp_path: Path) -> None:
    assert here().code == 2
    broken = Path(shutil.copytree(good, tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"")
    answer = here(broken)
    assert answer.code == 3
    assert "model.onnx" in answer.err
    bad_plan = Path(shutil.copytree(good, tmp_path / "bad_plan"))
    plan = json.loads((bad_plan / "plan.json").read_text())
    (bad_plan / "plan.json").write_text(json.dumps(plan | {"mode": "loose"}))
    reseal(bad_plan)
    answer = here(bad_plan)
    assert answer.code == 3
    assert f"{bad_plan / 'plan.json'}: not a valid plan: mode: Input should be 'compact' or 'stale'" in answer.err
    wrong = Path(shutil.copytree(good, tmp_path / "wrong"))
    write_onnx(wrong / "model.onnx", weight(seed=3))
    reseal(wrong)
    answer = here(wrong, "--json")
    assert answer.code == 5
    told = json.loads(answer.out)
    assert told["exit_code"] == told["error"]["code"] == 5
    assert (told["error"]["kind"], told["passed"]) == ("ParityFailed", False)
    assert "max error" in told["error"]["message"]


def without_edge(*arguments: object) -> Answer:
    """The base install: NumPy, pydantic, rich and tyro."""
    return run(*arguments, blocked=(*BLOCKED, "onnx", "onnxruntime", "onnx_graphsurgeon", "google", "PIL", "scipy"))


def test_the_base_install_checks_what_it_can(good: Path, tmp_path: Path) -> None:
    answer = without_edge(good, "--json")
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)
    assert {check["name"]: check["status"] for check in record["checks"]} == {
        "manifest": "passed",
        "files": "passed",
        "plan": "passed",
        "recipe": "passed",
        "parity report": "passed",
        "comparison": "not executed",
        "golden": "passed",
        "preprocessing": "not executed",
        "engine ran": "not executed",
        "golden parity": "not executed",
    }
    assert record["unchecked"] == [
        "comparison of parity.json: not checked: scipy is not installed",
        "preprocessing of golden.npz: not checked: PIL is not installed",
        "golden parity of model.onnx: not checked: onnx and onnxruntime are not installed",
        "golden parity of model-fp16.onnx: not checked: onnx and onnxruntime are not installed",
    ]
    assert "validate: 4 of 11 checks need packages that are not installed; install them: pip install" in answer.err
    assert "[edge]" in answer.err
    broken = Path(shutil.copytree(good, tmp_path / "broken"))
    data = bytearray((broken / "model.onnx").read_bytes())
    data[-1] ^= 1
    (broken / "model.onnx").write_bytes(data)
    answer = without_edge(broken)
    assert (answer.code, "model.onnx: its SHA-256 is not" in answer.err) == (3, True)


@pytest.mark.parametrize(
    "options",
    [
        ("--provider", "CPUExecutionProvider"),
        ("--images", "images"),
        pytest.param(("--require-executed",), marks=pytest.mark.slow),
    ],
)
def test_the_base_install_where_models_are_to_run(good: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    bundle = Path(shutil.copytree(good, tmp_path / "bundle"))
    mark_executed(bundle)
    answer = without_edge(bundle, *options)
    assert answer.code == 4, answer.out
    assert "install it: pip install" in answer.err


def mark_executed(bundle: Path) -> None:
    """Let the records say that the engine ran, as ONNX Runtime's does."""
    for name in ("parity.json", "manifest.json"):
        record = json.loads((bundle / name).read_text())
        record["rungs"][3] = record["rungs"][2] | {"stage": "engine"}
        record["engine"]["status"] = "passed"
        (bundle / name).write_text(json.dumps(record))
    reseal(bundle)


def test_what_is_required_and_cannot_be_checked(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(good, tmp_path / "bundle"))
    mark_executed(bundle)
    options = door.ValidateOptions(bundle, threads=1, latency_seconds=0, require_executed=True)
    assert door.run(options) == 0
    there = importlib.util.find_spec
    for module in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            gone = (module, "openvino")
            patch.setattr("importlib.util.find_spec", lambda name, gone=gone: None if name in gone else there(name))
            with pytest.raises(Unavailable, match=rf"golden parity of model\.onnx: not checked: {module} is not installed"):
                door.run(options)
            assert door.run(door.ValidateOptions(bundle, threads=1, latency_seconds=0)) == 0
            assert "passed as far as it could be checked here: exit code 0" in capsys.readouterr().out


def test_options_that_cannot_be_met(good: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--batch"):
        door.run(door.ValidateOptions(good, batch=0))
    with pytest.raises(Unavailable, match="NoSuchProvider"):
        door.run(door.ValidateOptions(good, engine=("ort",), provider="NoSuchProvider"))
    with pytest.raises(InputRejected, match="nowhere"):
        door.run(door.ValidateOptions(good, images=tmp_path / "nowhere", **ORT))


def test_help_is_quick() -> None:
    start = time.perf_counter()
    answer = run("--help", blocked=(*BLOCKED, "numpy", "onnx", "onnxruntime", "PIL"))
    assert answer.code == 0
    assert "--images" in answer.out
    assert time.perf_counter() - start < 5  # a second on an idle machine; the bound only catches a heavy import


def test_the_public_names() -> None:
    import validate

    for name in validate.__all__:
        assert getattr(validate, name).__name__ == name
    with pytest.raises(AttributeError):
        validate.nothing  # noqa: B018


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", get_args(Interpolation))
@pytest.mark.parametrize(
    ("size", "crop_pct"), [((3, 24, 24), 0.9), ((3, 24, 24), 1.0), ((3, 20, 32), 0.875), ((3, 16, 16), 1.3)]
)
def test_preprocessing_is_timms(
    photographs: list[Image.Image], crop_mode: str, size: tuple[int, int, int], crop_pct: float, interpolation: str
) -> None:
    from timm.data import create_transform

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    spec = Preprocessing.model_validate(
        {
            "input_size": size,
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
            "mean": mean,
            "std": std,
        }
    )
    transform = create_transform(
        input_size=size, interpolation=interpolation, mean=mean, std=std, crop_pct=crop_pct, crop_mode=crop_mode
    )
    for image in photographs:
        try:
            expected = transform(image).numpy()
        except ValueError:  # a thin image rounds to no width at all, in timm as here
            with pytest.raises(ValueError, match="must be > 0"):
                preprocess(image, spec)
            continue
        for rule in (None, spec.derived_rule()):
            found = preprocess(image, spec.model_copy(update={"rule": rule}))
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))  # all bits


def test_preprocessing_of_grey_and_transparent(photographs: list[Image.Image]) -> None:
    assert preprocess(photographs[0].convert("LA"), PREPROCESSING).shape == (3, SIZE, SIZE)
    grey = PREPROCESSING.model_copy(update={"input_size": (1, SIZE, SIZE), "mean": [0.5], "std": [0.5], "rule": None})
    assert preprocess(photographs[0], grey).shape == (1, SIZE, SIZE)


def test_folders_that_do_not_fit(good: Path, tmp_path: Path) -> None:
    from validate import load_manifest

    manifest = load_manifest(good)
    with pytest.raises(InputRejected, match="hold no images"):
        list_images(tmp_path, manifest)
    (tmp_path / "class 1").mkdir()
    with pytest.raises(InputRejected, match="hold no images"):
        list_images(tmp_path, manifest)
    (tmp_path / "class 1" / "a.png").write_bytes(b"no image")
    (tmp_path / "class 1" / "notes.txt").write_bytes(b"no image")
    listed = list_images(tmp_path, manifest)
    assert listed.images == [(tmp_path / "class 1" / "a.png", 1)]
    assert "1 file(s) left out (1 .txt;" in listed.notes[0]
    assert listed.notes[1] == "5 of 6 classes have no images here: 'class 0', 'class 2', 'class 3', 'class 4', 'class 5'"
    answer = here(good, "--images", tmp_path)
    assert answer.code == 3
    assert "a.png" in answer.err


def test_folders_that_have_nothing_to_do_with_the_labels(good: Path, tmp_path: Path) -> None:
    from validate import load_manifest

    manifest = load_manifest(good)
    for name in "abcdef":  # as many as the classes
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"")
    with pytest.raises(InputRejected, match=r"6 of its 6 subfolders .*'a', 'b', .* its classes are 'class 0'"):
        list_images(tmp_path, manifest)
    unlabelled = manifest.model_copy(update={"labels": []})
    listed = list_images(tmp_path, unlabelled)
    assert [target for _, target in listed.images] == [0, 1, 2, 3, 4, 5]
    assert "no labels" in listed.notes[0]
    shutil.rmtree(tmp_path / "f")
    with pytest.raises(InputRejected, match="5 subfolders for 6 classes"):
        list_images(tmp_path, unlabelled)
    twice = manifest.model_copy(update={"labels": ["a", "b", "c", "d", "e", "a"]})
    with pytest.raises(InputRejected, match="the label 'a' twice"):
        list_images(tmp_path, twice)


def write_pictures(folder: Path, wrong: int = 0) -> None:
    """Ten images that the bundle's models answer rightly, but for ``wrong`` of them, whose class is misnamed."""
    rng = np.random.default_rng(5)
    for number in range(10):
        picture = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
        answer = int((preprocess(picture, PREPROCESSING).reshape(1, -1) @ weight()).argmax())
        place = folder / f"class {(answer + (number < wrong)) % 6}"
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number}.png")


@pytest.mark.parametrize(
    ("gates", "fault"),
    [
        ({}, ""),
        ({"min_top1": 80.0, "max_top1_drop": 20.0}, ""),
        ({"min_top1": 80.1}, "less than --min-top1 80.1"),
        ({"max_top1_drop": 19.9}, "20.00 points less, more than --max-top1-drop 19.9"),
    ],
)
def test_gates_on_images(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gates: dict[str, float], fault: str
) -> None:
    write_pictures(tmp_path, wrong=2)
    code = door.run(door.ValidateOptions(good, images=tmp_path, **ORT, json=True, **gates))  # type: ignore[arg-type]
    told = capsys.readouterr()
    assert code == (5 if fault else 0)
    assert fault in told.err
    record = json.loads(told.out)
    assert (record["exit_code"], record["passed"]) == (code, not fault)
    assert [one["status"] for one in record["measured"]] == ["failed" if fault else "passed"] * 2
    found = next(
        check["detail"] for check in record["checks"] if check["subject"] == "model.onnx" and check["name"] == "images"
    )
    assert "top-1 80.00 % of 10 images here, 95 % CI 49.02 to 94.33; the bundle says 100.00 % of 10 images" in found
    assert ("proves nothing" in found) == (gates.get("max_top1_drop", 100.0) < 10)


def test_a_gate_that_one_image_decides(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path)
    assert door.run(door.ValidateOptions(good, images=tmp_path, **ORT, max_top1_drop=5.0)) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "one image of 10 decides this gate alone: it proves nothing" in told
    assert "one image of 10 is 10 points and decides this gate alone: it proves nothing; about 980 could" in told
    assert "gate: at most 0.2 points of top-1 lost; pytorch-slim lost 0.00 on 10 images, 95 % CI -16.33 to 16.33" in told


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0.0},
        {"timeout": float("inf")},
        {"memory": -1.0},
        {"min_top1": 1.0},
        {"max_top1_drop": 1.0},
        {"min_top1": 101.0, "images": Path()},
        {"expect_manifest_sha256": "12ab"},
        {"hint": "throughput", "engine": ("ort",)},
        {"hint": "latency", "attestation": Path("attestation.json")},
    ],
)
def test_options_that_mean_nothing(good: Path, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--"):
        door.run(door.ValidateOptions(good, **options))  # type: ignore[arg-type]


def test_a_manifest_that_is_expected(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sha256 = hashlib.sha256((good / "manifest.json").read_bytes()).hexdigest()
    assert door.run(door.ValidateOptions(good, **ORT, expect_manifest_sha256=sha256.upper())) == 0
    assert door.run(door.ValidateOptions(good, expect_manifest_sha256="0" * 64)) == 3
    assert sha256 in capsys.readouterr().err


def test_an_engine_that_never_ran(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert door.run(door.ValidateOptions(good, **ORT, require_executed=True)) == 5
    assert "never ran where it was built" in capsys.readouterr().err


def test_pictures_that_are_traps(good: Path, tmp_path: Path) -> None:
    from validate.images import batches

    bomb, thin, pipe = (tmp_path / f"{name}.png" for name in ("bomb", "thin", "pipe"))
    Image.new("1", (20_000, 20_000)).save(bomb)
    Image.new("1", (1, 40_000)).save(thin)
    os.mkfifo(pipe)
    wide = PREPROCESSING.model_copy(update={"input_size": (3, 224, 224), "rule": None})
    for path, word in ((bomb, "decompression bomb"), (thin, "would be resized to"), (pipe, "not a regular file")):
        with pytest.raises(InputRejected, match=rf"{path.name}: .*{word}"):
            next(batches([(path, 0)], wide, 8))
    folder = tmp_path / "class 1"
    folder.mkdir()
    pipe.rename(folder / "pipe.png")
    assert here(good, "--images", tmp_path).code == 3
    assert len(list(folder.iterdir())) == 1
