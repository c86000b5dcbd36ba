"""Images of one's own: a folder without splits calibrates with a share of its images and is measured on the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export import export_bundle
from slimming.data.digits import render
from slimming.data.source import calibration_set, evaluation_set
from tests.helpers.exports import read, tiny
from validate import check_bundle

if TYPE_CHECKING:
    from export.pipeline import Outcome

NAMES = ("even", "odd")
IMAGES = 30


def draw(folder: Path, start: int = 0, count: int = IMAGES, names: tuple[str, str] = NAMES) -> None:
    """Real handwritten digits as PNG files, sorted into even and odd."""
    for index in range(start, start + count):
        image, digit, _ = render("train", index)
        place = folder / names[digit % 2] / f"{index:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.resize((64, 64)).save(place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "images"
    draw(path)
    return path


@pytest.fixture(scope="module")
def outcome(folder: Path, export_work: Path) -> Outcome:
    return export_bundle(tiny(export_work, "own", data=str(folder), calibration_images=99, eval_images="all", fit="none"))


def test_what_calibrates_is_not_measured(folder: Path, outcome: Outcome) -> None:
    calibration, evaluation = calibration_set(str(folder), 99), evaluation_set(str(folder), None)
    assert len(calibration) + len(evaluation) == IMAGES
    assert not set(calibration.indices) & set(evaluation.indices)
    manifest = read(outcome.bundle / "manifest.json")
    assert manifest["calibration"]["share"] == calibration.fraction == 0.2
    assert manifest["calibration"]["images"] == len(calibration)
    assert "disjoint" in manifest["calibration"]["data"]
    assert manifest["evaluation"]["images"] == len(evaluation)
    assert manifest["evaluation"]["split"] == "none (80%, disjoint)"
    assert manifest["calibration"]["fingerprint"] != manifest["evaluation"]["fingerprint"]


def test_the_head_and_the_labels_are_the_datas(outcome: Outcome) -> None:
    manifest = read(outcome.bundle / "manifest.json")
    assert manifest["labels"] == list(NAMES)
    assert manifest["outputs"][0]["shape"] == ["batch", 2]
    assert all(rung["top5"] == 100 for rung in manifest["rungs"])  # of two classes the right one is always among five
    assert check_bundle(outcome.bundle).passed


def test_other_images_may_calibrate(folder: Path, export_work: Path, tmp_path: Path) -> None:
    draw(tmp_path / "more", start=IMAGES, count=12, names=("a", "b"))
    more = {"calibration_data": str(tmp_path / "more"), "eval_images": "all", "fit": "none"}
    options = tiny(export_work, "apart", data=str(folder), **more)
    manifest = read(export_bundle(options).bundle / "manifest.json")
    assert manifest["calibration"]["data"].startswith(str(tmp_path / "more"))
    assert manifest["calibration"]["images"] == 12  # all of them: none of these is measured
    assert manifest["calibration"]["share"] is None
    assert manifest["evaluation"]["data"] == str(folder)
    assert (manifest["evaluation"]["images"], manifest["evaluation"]["split"]) == (IMAGES, "none (all)")  # and all of those
    assert manifest["labels"] == list(NAMES)  # of the images that are measured


def test_new_images_in_the_folder_are_noticed(export_work: Path, tmp_path: Path) -> None:
    draw(tmp_path / "images", count=15)
    options = tiny(export_work, "grown", data=str(tmp_path / "images"), eval_images="all", fit="none")
    before = export_bundle(options)
    draw(tmp_path / "images", start=15, count=15)
    after = export_bundle(options)
    assert (before.parity.evaluation.images, after.parity.evaluation.images) == (12, 24)
    assert before.parity.evaluation.fingerprint != after.parity.evaluation.fingerprint
    assert before.plan.origin.calibration != after.plan.origin.calibration
