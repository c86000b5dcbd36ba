"""The pictures that go along with the golden inputs: which, how many, and that they are those inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from export.cache import FactStore, StageCache
from export.golden import golden_images
from export.source import ExportSource
from export.stages import Workspace
from patchslim.errors import InputRejected
from patchslim.progress import Reporter
from slimming.data.digits import render
from slimming.data.source import load_tensors
from tests.helpers.exports import read, tiny
from validate import check_bundle

if TYPE_CHECKING:
    from export.pipeline import Outcome


def test_the_bundle_holds_the_pictures_of_its_golden_inputs(ort_export: Outcome) -> None:
    manifest = read(ort_export.bundle / "manifest.json")
    assert manifest["golden_images"] == [{"path": f"golden/{row}.png", "row": row} for row in range(8)]
    assert manifest["preprocessing"]["rule"]["resize"]["filter"] == manifest["preprocessing"]["interpolation"]
    assert {"golden/0.png", "golden/7.png"} < {record["path"] for record in manifest["files"]}
    for row in range(8):
        with Image.open(ort_export.bundle / f"golden/{row}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(render("test", row)[0]))
    (found,) = [check for check in check_bundle(ort_export.bundle).checks if check.name == "preprocessing"]
    assert found.detail == "the rule makes the golden inputs of 8 pictures, bit for bit"


def prepared(folder: Path, sizes: list[tuple[int, int]], work: Path) -> tuple[ExportSource, np.ndarray, Workspace]:
    """A small model, its first held-out inputs, and where stages are kept; the images are plain, of ``sizes``."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), (10, 200, 30)).save(folder / split / name / "z.png")
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number, 100, 200)).save(folder / "val" / "a" / f"{number}.png")
    options = tiny(work, data=str(folder), eval_images="all")
    source = ExportSource(options, FactStore(work / "facts"))
    batches = load_tensors(source.evaluation_images, source.session.transform, 8)
    return source, next(pixels.numpy() for pixels, _ in batches), Workspace(StageCache(work, Reporter().say), Reporter())


def test_large_pictures_stay_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [(2900, 2900), (3000, 3000), (2900, 2800), (1, 40)]
    source, inputs, work = prepared(tmp_path / "images", sizes, tmp_path / "work")
    found = golden_images(source, inputs, work)
    assert sorted(found) == [0, 2, 3, 4, 5]  # 8.41 + 8.12 of 16.78 million pixels; 9 more would not fit
    assert "golden: 1 of 6 pictures are too large to go along" in capsys.readouterr().err


def test_one_goes_along_where_all_are_large(tmp_path: Path) -> None:
    source, inputs, work = prepared(tmp_path / "images", [(5000, 4000), (4200, 4100)], tmp_path / "work")
    assert sorted(golden_images(source, inputs[:2], work)) == [1]


def test_inputs_that_the_rule_does_not_make(tmp_path: Path) -> None:
    source, inputs, work = prepared(tmp_path / "images", [(50, 60)], tmp_path / "work")
    with pytest.raises(InputRejected, match="prepares its images in a way that the manifest has no rule for: 3 of 6912"):
        golden_images(source, np.where(np.arange(48 * 48).reshape(48, 48) == 7, inputs + 1e-6, inputs)[:1], work)
    assert not list((tmp_path / "work").glob("golden-*"))
