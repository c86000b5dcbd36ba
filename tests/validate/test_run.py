"""The door of ``validate``, run as a user runs it: without torch, with images, as JSON, with every exit code."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchslim.errors import InputRejected, Unavailable, UsageError
from tests.helpers.bundles import PREPROCESSING, SIZE, make_bundle, reseal, weight, write_onnx
from tests.helpers.validate_process import BLOCKED, run
from validate import run as door
from validate.images import list_images, preprocess
from validate.manifest import Preprocessing


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(31, 47), (64, 40), (50, 50), (9, 120), (7, 5)]
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def test_without_torch(good: Path) -> None:
    answer = run(good, "--threads", 1)
    assert answer.code == 0, answer.err
    for word in ("pytorch-slim", "golden parity", "model-fp16.onnx", "exit code 0"):
        assert word in answer.out


def test_as_json_with_images(good: Path, photographs: list[Image.Image], tmp_path: Path) -> None:
    for number, image in enumerate(photographs):
        folder = tmp_path / "images" / f"class {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    answer = run(good, "--json", "--images", tmp_path / "images", "--batch", 2, "--threads", 1)
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)
    assert record["passed"]
    assert [rung["stage"] for rung in record["measured"]] == ["onnx-slim", "onnx-slim-fp16"]
    tensors = np.stack([preprocess(image, PREPROCESSING) for image in photographs])
    right = (tensors.reshape(len(tensors), -1) @ weight()).argmax(axis=1) == np.arange(len(photographs)) % 3
    assert record["measured"][0]["top1"] == pytest.approx(100 * right.mean())
    assert record["measured"][0]["images"] == len(photographs)


def test_exit_codes(good: Path, tmp_path: Path) -> None:
    assert run().code == 2
    broken = Path(shutil.copytree(good, tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"")
    answer = run(broken)
    assert answer.code == 3
    assert "model.onnx" in answer.err
    bad_plan = Path(shutil.copytree(good, tmp_path / "bad_plan"))
    plan = json.loads((bad_plan / "plan.json").read_text())
    (bad_plan / "plan.json").write_text(json.dumps(plan | {"mode": "loose"}))
    reseal(bad_plan)
    answer = run(bad_plan)
    assert answer.code == 3
    assert f"{bad_plan / 'plan.json'}: not a valid plan: mode: Input should be 'compact' or 'stale'" in answer.err
    wrong = Path(shutil.copytree(good, tmp_path / "wrong"))
    write_onnx(wrong / "model.onnx", weight(seed=3))
    reseal(wrong)
    answer = run(wrong, "--json")
    assert answer.code == 5
    assert json.loads(answer.out)["exit_code"] == 5
    answer = run(good, blocked=(*BLOCKED, "onnxruntime"))
    assert answer.code == 4
    assert "[edge]" in answer.err


def test_options_that_cannot_be_met(good: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--batch"):
        door.run(door.ValidateOptions(good, batch=0))
    with pytest.raises(Unavailable, match="NoSuchProvider"):
        door.run(door.ValidateOptions(good, provider="NoSuchProvider"))
    with pytest.raises(InputRejected, match="nowhere"):
        door.run(door.ValidateOptions(good, images=tmp_path / "nowhere"))


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
@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"),
    [
        ((3, 24, 24), 0.9, "bicubic"),
        ((3, 24, 24), 1.0, "bilinear"),
        ((3, 20, 32), 0.875, "bicubic"),
        ((3, 16, 16), 1.3, "lanczos"),
    ],
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
        np.testing.assert_allclose(preprocess(image, spec), expected, rtol=0, atol=1e-6)


def test_preprocessing_of_grey_and_transparent(photographs: list[Image.Image]) -> None:
    assert preprocess(photographs[0].convert("LA"), PREPROCESSING).shape == (3, SIZE, SIZE)
    grey = PREPROCESSING.model_copy(update={"input_size": (1, SIZE, SIZE), "mean": [0.5], "std": [0.5]})
    assert preprocess(photographs[0], grey).shape == (1, SIZE, SIZE)


def test_folders_that_do_not_fit(good: Path, tmp_path: Path) -> None:
    from validate import load_manifest

    manifest = load_manifest(good)
    with pytest.raises(InputRejected, match="0 subfolders"):
        list_images(tmp_path, manifest)
    (tmp_path / "class 1").mkdir()
    with pytest.raises(InputRejected, match="hold no images"):
        list_images(tmp_path, manifest)
    (tmp_path / "class 1" / "a.png").write_bytes(b"no image")
    assert list_images(tmp_path, manifest) == [(tmp_path / "class 1" / "a.png", 1)]
    answer = run(good, "--images", tmp_path)
    assert answer.code == 3
    assert "a.png" in answer.err
    for name in "abcde":
        (tmp_path / name).mkdir()
    (tmp_path / "class 1" / "a.png").rename(tmp_path / "b" / "a.png")
    assert list_images(tmp_path, manifest) == [(tmp_path / "b" / "a.png", 1)]
