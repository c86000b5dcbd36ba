"""What every door owes its user: help without heavy imports, and exit code 2 for options it cannot read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOORS = ("export.run", "export.build", "slimming.run", "graph_passes.run", "validate.run", "validate.diff", "export.console")
#: Packages that take long to import. Help that loads none of them answers in well under a second.
HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnx_graphsurgeon",
    "onnxruntime",
    "onnxscript",
    "tensorrt",
    "tensorrt_rtx",
    "openvino",
    "matplotlib",
    "sklearn",
    "scipy",
    "pandas",
    "datasets",
    "numpy",
    "PIL",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("door", DOORS)
def test_help_loads_nothing_heavy(door: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{door!r}, '--help']\n"
        f"try: runpy.run_module({door!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('LOADED', *(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    shown, _, loaded = done.stdout.rpartition("LOADED")
    assert "--help" in shown
    assert loaded.split() == []


@pytest.mark.parametrize("door", DOORS)
def test_an_unknown_option_is_exit_code_2(door: str) -> None:
    needed = {"validate.run": ["bundle"], "validate.diff": ["a", "b"], "export.build": ["recipe.json", "-o", "engine"]}.get(
        door, []
    )
    done = run("-m", door, *needed, "--no-such-option")
    assert done.returncode == 2, done.stderr
    assert "--no-such-option" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("door", "arguments"),
    [
        ("export.run", ["--engine", "abacus"]),
        ("export.run", ["--eval-images", "many"]),
        ("slimming.run", ["--layout", "sideways"]),
        ("graph_passes.run", ["--layout", "sideways"]),
        ("graph_passes.run", []),
        ("validate.run", []),
        ("export.build", ["recipe.json"]),
        ("validate.diff", ["a"]),
        ("export.build", ["recipe.json", "-o", "engine", "--engine", "abacus"]),
        ("validate.run", ["bundle", "--threads", "two"]),
    ],
)
def test_an_impossible_value_is_exit_code_2(door: str, arguments: list[str]) -> None:
    done = run("-m", door, *arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_that_cannot_be_written_is_refused_before_the_search(tmp_path: Path) -> None:
    done = run("-m", "slimming.run", "--output", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert f"--output {tmp_path}: not a file that can be written" in done.stderr
    assert "searching" not in done.stderr
