"""The weights that are shipped, and the script that made them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from timm.data import create_transform

from benchmarks.training import train_digits as train
from slimming.data.source import evaluation_set, load_tensors
from slimming.models.loading import bundled_weights, load_model


def test_the_bundled_weights_are_small_and_recorded() -> None:
    path = bundled_weights("vit_ti")
    assert path.stat().st_size <= 12e6
    loaded = load_model("vit_ti", classes=10)
    assert loaded.record == json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert loaded.record["test_images"] >= 4000
    assert loaded.record["test_top1"] > 95


@pytest.mark.parametrize("count", [48, pytest.param(160, marks=pytest.mark.slow)])
def test_the_bundled_weights_know_held_out_digits(count: int) -> None:
    loaded = load_model("vit_ti", classes=10)
    right = 0
    with torch.inference_mode():
        for pixels, targets in load_tensors(evaluation_set("digits", count), create_transform(**loaded.data_config)):
            right += int((loaded.module(pixels).argmax(1) == targets).sum())
    assert right / count > 0.9735 - 4 * (0.9735 * 0.0265 / count) ** 0.5  # 97.35 % on 4,000 images, less four standard errors


def test_the_training_script_runs_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "weights.safetensors"
    arguments = ["--output", str(output), "--stages", "6:2:4", "14:1:2", "--images", "12", "--eval-images", "6", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    train.main()
    loaded = load_model("vit_ti", weights=str(output), classes=10)
    assert loaded.record["seed"] == 3
    assert loaded.record["stages"] == ["6:2:4", "14:1:2"]
    assert loaded.data_config["crop_pct"] == 1.0
    assert not list(tmp_path.glob("*.checkpoint*"))


def test_the_bundled_weights_bring_their_classes_and_their_licence() -> None:
    loaded = load_model("vit_ti")
    assert (loaded.module.num_classes, loaded.license) == (10, "Apache-2.0")
