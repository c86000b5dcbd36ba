"""Exports of a ViT small enough to be run often: three blocks, nine patches, random weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from export.options import ExportOptions

ROOT = Path(__file__).parents[2]
DEPTH, TOKENS = 3, 10
ARGUMENTS = ("img_size=48", f"depth={DEPTH}", "embed_dim=48", "num_heads=3")
MODEL = "vit_tiny_patch16_224"
CALIBRATION, EVALUATION = 24, 40
#: Random weights that answer 9 of the 40 held-out images rightly, and 4 when every patch is dropped: a real loss of top-1.
SEED = 8


def tiny(work: Path, name: str = "bundle", **changes: Any) -> ExportOptions:
    """ExportOptions of a small export into the folder ``name`` beside ``work``."""
    given: dict[str, Any] = {
        "model": MODEL,
        "model_arg": ARGUMENTS,
        "weights": "random",
        "seed": SEED,
        "calibration_images": CALIBRATION,
        "eval_images": EVALUATION,
        "max_top1_drop": 100.0,
        "measure_latency": False,
        "device": "cpu",
        "output": work.parent / name,
        "work": work,
    }
    return ExportOptions(**{**given, **changes})


def command(work: Path, name: str, *more: str) -> list[str]:
    """The same as a command line."""
    given = {"seed": SEED, "calibration-images": CALIBRATION, "eval-images": EVALUATION, "max-top1-drop": 100, "device": "cpu"}
    options = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    arguments = [text for pair in ARGUMENTS for text in ("--model-arg", pair)]
    places = ["--output", str(work.parent / name), "--work", str(work)]
    door = [sys.executable, "-m", "export.run", "--model", MODEL, "--weights", "random"]
    return [*door, *arguments, *options, *places, "--no-measure-latency", *more]


def door(arguments: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command line in the repository's root."""
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, **more)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stages_in(work: Path) -> dict[str, int]:
    """Every stage in a work folder, and when it was put there; what is known of files (``facts``) is not one."""
    return {path.name: path.stat().st_mtime_ns for path in work.iterdir() if path.name != "facts"}


def read(path: Path) -> Any:
    """A JSON file's value."""
    return json.loads(path.read_text(encoding="utf-8"))


def change_plan(source: Path, target: Path, kept: list[list[int]]) -> Path:
    """A plan like ``source`` that keeps other tokens, for the original's weights."""
    plan = read(source) | {"kept": kept, "merged_into": None, "weights": None}
    target.write_text(json.dumps(plan), encoding="utf-8")
    return target


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let it look as if packages were not installed."""
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in names else there(name))
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
