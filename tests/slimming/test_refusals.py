"""What slimming and export say at once: budgets that contradict each other, names that cannot be, and what is not there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from rich.console import Console

from export.options import ExportOptions
from patchslim.errors import InputRejected, UsageError
from patchslim.work_folder import default_work
from slimming.models.timm_names import timm_names
from slimming.report.points import SweepPoint
from slimming.report.tables import sweep_table
from slimming.run import SlimmingOptions
from slimming.search.budget import Budget

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("options", [ExportOptions, SlimmingOptions])
@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            {"macs_reduction": 0.3, "tolerance": 0.01},
            "--macs-reduction and --tolerance contradict each other: give one of them",
        ),
        ({"macs_reduction": 0.45, "tokens": "9,9,1"}, "--macs-reduction and --tokens"),  # the default, but given
        ({"tokens": "9,9,1", "latency_reduction": 0.2}, "--tokens and --latency-reduction"),
    ],
)
def test_budgets_that_contradict_each_other(options: Callable[..., Any], given: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        options(**given).check()


def test_a_budget_beside_what_has_its_own() -> None:
    with pytest.raises(UsageError, match="--dense and --macs-reduction contradict each other: leave one of them out"):
        ExportOptions(dense=True, macs_reduction=0.3).check()
    with pytest.raises(UsageError, match="--plan and --tolerance"):
        ExportOptions(plan=Path("plan.json"), tolerance=0.01).check()


def test_the_default_budget() -> None:
    options = SlimmingOptions()
    options.check()
    assert options.budget == Budget("macs-reduction", 0.45)
    assert SlimmingOptions(macs_reduction=0.3).budget == Budget("macs-reduction", 0.3)
    assert SlimmingOptions(tolerance=0.01).budget == Budget("tolerance", 0.01)


@pytest.mark.parametrize("name", ["my plan.json", "plan[1].json", "plän.json", "-plan.json", "a" * 200 + ".json", "ä" * 100])
def test_a_name_that_the_weights_cannot_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"--output .*: name it plan\.json"):
        SlimmingOptions(output=tmp_path / name).check_output()


def test_a_plan_without_weights_may_have_any_name(tmp_path: Path) -> None:
    SlimmingOptions(output=tmp_path / "mein plän.json", fit="none").check_output()
    SlimmingOptions(output=tmp_path / "plan-1_b.json").check_output()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model": "vit_tii"}, "model vit_tii: not a preset .* and not a model of timm .*; did you mean vit_ti"),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors: no such weights file"),
        ({"data": "nowhere"}, "nowhere: no such data"),
        ({"data": "empty"}, "empty: holds no images in class folders"),
        ({"data": "wds/nowhere"}, "wds/nowhere: nowhere is not a folder"),
        ({"calibration_data": "nowhere"}, "nowhere: no such data"),
        ({"train_data": "nowhere", "finetune_epochs": 1.0}, "nowhere: no such data"),
        ({"latency_table": Path("nowhere.json")}, "latency table nowhere.json: is missing"),
        ({"onnx": Path("nowhere.onnx")}, "--onnx nowhere.onnx: is missing"),
        ({"onnx": Path("empty")}, "--onnx empty: is not a file"),
    ],
)
def test_what_is_not_there(tmp_path: Path, given: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "cat" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    options = SlimmingOptions(**given)
    options.check()
    with pytest.raises(InputRejected, match=named):
        options.check_inputs()


@pytest.mark.parametrize(
    ("door", "arguments"),
    [
        ("export.run", ["--model", "vit_tii"]),
        ("export.run", ["--plan", "nowhere.json"]),
        ("slimming.run", ["--data", "nowhere", "-o", "nowhere/plan.json"]),
    ],
)
def test_it_is_said_before_pytorch_is_loaded(door: str, arguments: list[str]) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[door, *arguments]!r}\n"
        f"try: runpy.run_module({door!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "3 False\n", done.stderr


def test_models_are_known_without_loading_timm() -> None:
    assert set(timm.list_models()) <= timm_names()


@pytest.mark.parametrize("home", ["work", "cache"])
def test_a_work_folder_needs_no_home(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv({"work": "PATCHSLIM_WORK", "cache": "XDG_CACHE_HOME"}[home], str(tmp_path))
    monkeypatch.setattr(Path, "home", no_home)
    assert default_work() == (tmp_path if home == "work" else tmp_path / "patchslim")
    monkeypatch.delenv("PATCHSLIM_WORK", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(UsageError, match="no home directory to keep stages in: pass --work FOLDER"):
        default_work()


def no_home() -> Path:
    """As ``Path.home`` where the user has no entry in the password file."""
    raise RuntimeError("Could not determine home directory.")


def test_the_sweep_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    points = [
        SweepPoint(0.45, 600_000_000, [150, 90, 1], 72.5, 80.0, []),
        SweepPoint(0.3, 800_000_000, [170, 120, 1], 74.25, 91.0, []),
        SweepPoint(0.45, 600_000_000, [150, 90, 1], 72.5, 80.0, []),
    ]
    Console(width=120).print(sweep_table(points, 75.0))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert rows == [
        ["30.0%", "0.800", "170 to 1", "74.25 %", "-0.75", "91.00 %"],
        ["45.0%", "0.600", "150 to 1", "72.50 %", "-2.50", "80.00 %"],
    ]
    Console(width=120).print(sweep_table([SweepPoint(0.3, 8, [3], None, None, [])], None))
    assert capsys.readouterr().out.count(" - ") == 3
