"""What a user has to know is said by every run, also by one that takes all from the work folder, and once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from export import export_bundle
from export.cache import DIGESTS, StageCache
from export.options import ExportOptions
from patchslim.files import digest
from slimming.data.digits import render
from tests.helpers.exports import ARGUMENTS, MODEL, tiny


def checkpoint(path: Path) -> Path:
    """Plain weights, their running average, and a tensor of no model beside them."""
    arguments = {key: int(value) for key, _, value in (pair.partition("=") for pair in ARGUMENTS)}
    torch.manual_seed(0)
    state = timm.create_model(MODEL, num_classes=2, **arguments).state_dict()
    averaged = {f"module.{key}": value / 2 for key, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "data"
    for index in range(24):
        picture, digit, _ = render("train", index)
        place = folder / ("even", "odd")[digit % 2] / f"{index:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((64, 64)).save(place)
    (folder / "odd" / "one.gif").write_bytes(b"")
    return folder


def said_by_two_runs(options: ExportOptions, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What each of two exports writes to stderr, on one line; the second finds all that it needs."""
    said = []
    for _ in range(2):
        export_bundle(options)
        said.append(" ".join(capsys.readouterr().err.split()))
    assert "exporting the dense model" in said[0]
    assert "exporting the dense model" not in said[1]
    return said


def test_what_was_taken_and_left_out_is_said_again(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.cache.SETTLED_NS", 0)  # else what is known of files just written is not kept
    weights = checkpoint(tmp_path / "both.pth")
    options = tiny(tmp_path / "work", data=str(images), weights=str(weights), ema=True, eval_images="all")
    for text in said_by_two_runs(options, capsys):
        assert text.count("1 file(s) left out (1 .gif;") == 1
        assert text.count("state_dict_ema") == 1


def test_a_fit_that_cannot_be_is_said_again(export_work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*ARGUMENTS, "patch_size=16", "mlp_ratio=4.0")
    options = tiny(export_work, "post-norm", model="eva02_enormous_patch14_clip_224", model_arg=arguments)
    for text in said_by_two_runs(options, capsys):
        assert text.count("they cannot be refitted in closed form: --fit none") == 1


def test_the_fit_that_auto_takes_is_said_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in said_by_two_runs(tiny(tmp_path / "work", fit="auto"), capsys):
        assert text.count("--fit closed-form: 24 calibration images, and distilling wants 1,024") == 1
        assert "--fit distill" not in text


def test_a_stage_keeps_its_notes(tmp_path: Path) -> None:
    def build(part: Path) -> list[str]:
        (part / "file").write_bytes(b"made")
        return ["a thing to know", "another"]

    for made in (True, False):
        said: list[str] = []
        cache = StageCache(tmp_path / "work", said.append)
        folder = cache.path("plan", seed=1)
        assert cache.make(folder, build) is made
        assert not cache.make(folder, build)
        assert said == ["a thing to know", "another"]
    (folder / "notes.json").write_text("[]")
    said.clear()
    cache = StageCache(tmp_path / "work", said.append)
    assert cache.make(folder, build)
    assert "notes.json was changed" in said[0]
    assert said[1:] == ["a thing to know", "another"]


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[1]", "\xff", " " * (2 << 20)])
def test_notes_that_are_none_are_made_anew_although_their_digest_is_right(tmp_path: Path, text: str) -> None:
    said: list[str] = []
    cache = StageCache(tmp_path, said.append)
    folder = cache.path("plan", seed=1)
    cache.make(folder, lambda part: ["a thing to know"])
    notes = folder / "notes.json"
    notes.write_bytes(text.encode("latin-1"))
    (folder / DIGESTS).write_text(json.dumps({"notes.json": digest(notes)}))
    said.clear()
    assert StageCache(tmp_path, said.append).make(folder, lambda part: ["a thing to know"])
    assert said == [f"{folder.name}: notes.json cannot be read; it is made anew", "a thing to know"]
