"""The accuracy gate and the place of the bundle: what fails is not published, and what is published is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export import export_bundle
from export.publication import publish
from patchslim.errors import InputRejected, ParityFailed, UsageError
from tests.helpers.commands import door_here
from tests.helpers.exports import DEPTH, change_plan, command, digests, read, tiny
from validate import check_bundle
from validate.bundle import load_manifest
from validate.manifest import Manifest

if TYPE_CHECKING:
    from export.pipeline import Outcome


@pytest.fixture(scope="module")
def savage(ort_export: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that drops every patch in the first block."""
    return change_plan(ort_export.bundle / "plan.json", tmp_path_factory.mktemp("savage") / "plan.json", [[0]] * DEPTH)


def test_too_large_a_drop_is_not_published(savage: Path, export_work: Path) -> None:
    with pytest.raises(ParityFailed, match=r"pytorch-slim: top-1 drops by \d+\.\d+ points, more than 1") as caught:
        export_bundle(tiny(export_work, "dropped", plan=savage, max_top1_drop=1.0))
    assert caught.value.exit_code == 5
    assert not (export_work.parent / "dropped").exists()
    failed = export_work / "dropped.failed"
    assert str(failed) in str(caught.value)
    parity = read(failed / "parity.json")
    assert not parity["passed"]
    original, slim = parity["rungs"][:2]
    assert original["top1"] - slim["top1"] == pytest.approx(slim["top1_drop"])
    assert slim["top1_drop"] > 5
    assert (original["status"], slim["status"]) == ("passed", "failed")
    verdict = check_bundle(failed)
    assert not verdict.passed
    assert verdict.exit_code == 5


def test_the_gate_allows_exactly_its_limit(savage: Path, export_work: Path) -> None:
    with pytest.raises(ParityFailed):
        export_bundle(tiny(export_work, "limit", plan=savage, max_top1_drop=0.0))
    drop = read(export_work / "limit.failed" / "parity.json")["rungs"][1]["top1_drop"]
    assert export_bundle(tiny(export_work, "limit", plan=savage, max_top1_drop=drop)).parity.passed
    with pytest.raises(ParityFailed):
        export_bundle(tiny(export_work, "limit", plan=savage, max_top1_drop=drop - 0.01))


def test_a_failed_gate_leaves_the_earlier_bundle(ort_export: Outcome, savage: Path, export_work: Path) -> None:
    place = export_work.parent / "earlier"
    shutil.copytree(ort_export.bundle, place)
    before = digests(place)
    with pytest.raises(ParityFailed):
        export_bundle(tiny(export_work, "earlier", plan=savage, max_top1_drop=0.0))
    assert digests(place) == before


def test_the_door_says_exit_code_5(savage: Path, export_work: Path) -> None:
    done = door_here(command(export_work, "dropped-too", "--plan", str(savage), "--max-top1-drop", "1", "--json"))
    assert done.returncode == 5, done.stderr
    said = json.loads(done.stdout)
    assert said["passed"] is False
    assert said["bundle"] == str(export_work / "dropped-too.failed")
    assert "failed" in [rung["status"] for rung in said["rungs"]]
    assert "Traceback" not in done.stderr
    assert "the bundle is not published" in done.stderr
    assert not (export_work.parent / "dropped-too").exists()
    assert check_bundle(export_work / "dropped-too.failed").exit_code == 5


def test_an_earlier_bundle_is_replaced_whole(ort_export: Outcome, export_work: Path) -> None:
    place = export_work.parent / "replaced"
    shutil.copytree(ort_export.bundle, place)
    before = digests(place)
    outcome = export_bundle(tiny(export_work, "replaced", dense=True))
    assert outcome.bundle == place
    assert outcome.plan.is_dense
    assert digests(place) != before
    assert check_bundle(place).passed
    assert not list(place.parent.glob(".replaced*"))


def test_a_bundle_that_cannot_be_filled_leaves_the_earlier_one(ort_export: Outcome, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    shutil.copytree(ort_export.bundle, place)
    before = digests(place)

    def fill(folder: Path) -> Manifest:
        assert folder.stat().st_dev == tmp_path.stat().st_dev  # so that the rename is atomic
        assert folder.is_relative_to(tmp_path)
        assert digests(place) == before
        (folder / "model.onnx").write_bytes(b"half a model")
        raise InputRejected("no more")

    with pytest.raises(InputRejected, match="no more"):
        publish(fill, place)
    assert digests(place) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_manifest_is_written_last(ort_export: Outcome, tmp_path: Path) -> None:
    manifest = load_manifest(ort_export.bundle)

    def fill(folder: Path) -> Manifest:
        shutil.copytree(ort_export.bundle, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        assert not (tmp_path / "deep" / "bundle").exists()
        return manifest

    publish(fill, tmp_path / "deep" / "bundle")
    assert digests(tmp_path / "deep" / "bundle") == digests(ort_export.bundle)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_output_that_holds_something_else_is_refused_and_left(ort_export: Outcome, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "mine"
    if kind == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("years of work")
    elif kind == "file":
        place.write_text("years of work")
    else:
        place.symlink_to(ort_export.bundle)
    before = digests(tmp_path)
    with pytest.raises(UsageError, match="--output") as caught:
        export_bundle(tiny(tmp_path / "work", "mine"))
    assert caught.value.exit_code == 2
    assert digests(tmp_path) == before
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("output", [".", "..", "/", "there/.."])
def test_an_output_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(UsageError, match="--output"):
        export_bundle(tiny(tmp_path / "work", output=Path(output)))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("place", ["file/bundle", "file/deep/bundle"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UsageError, match="not a folder that can be written"):
        export_bundle(tiny(tmp_path / "work", place))
    assert not (tmp_path / "work").exists()


def test_a_published_bundle_can_be_read_by_others(ort_export: Outcome, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert ort_export.bundle.stat().st_mode == (tmp_path / "plain").stat().st_mode
