"""``patchslim doctor`` tells the truth about this machine, and asks the code that builds engines which of them work."""

from __future__ import annotations

import itertools
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import get_args

import onnx
import pytest
import torch

from export.doctor import examine, instruction_sets, onnxruntime_providers, print_report
from export.engines.base import ENGINES, TARGETS
from export.engines.support import Status, engine_support
from export.options import ExportOptions
from export.run import run
from patchslim import cuda
from patchslim.choices import EngineName, Precision
from patchslim.packages import PACKAGES, install_command
from tests.helpers.commands import door_here

ROOT = Path(__file__).parents[2]


def test_every_engine_target_and_precision_has_one_row() -> None:
    rows = [(row.engine, row.target, row.precision) for row in engine_support()]
    assert len(rows) == len(set(rows))
    assert {engine for engine, _, _ in rows} == set(get_args(EngineName))
    for engine, traits in ENGINES.items():
        here = [cuda.local_target()] if engine == "trt" else []
        targets = {*traits.targets, *filter(None, here)}
        assert {row[1:] for row in rows if row[0] == engine} == set(itertools.product(targets, traits.precisions))
        assert {*traits.precisions} <= {*get_args(Precision)}
        assert traits.default in traits.precisions


def test_export_lists_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ExportOptions(list_engines=True, json=True)) == 0
    assert json.loads(capsys.readouterr().out) == {"engines": examine()["engines"]}
    assert run(ExportOptions(list_engines=True)) == 0
    text = capsys.readouterr().out
    assert all(f" {word} " in text for traits in ENGINES.values() for word in (*traits.targets, *traits.precisions))


def test_a_row_that_does_not_work_says_why() -> None:
    for row in engine_support():
        assert row.status in get_args(Status)
        assert bool(row.backend) == (row.status in ("runs", "builds")) or row.engine == "ort"
        assert row.reason or row.status in ("runs", "builds")


def test_rows_are_what_the_builders_say() -> None:
    states = {(row.engine, row.target, row.precision): row for row in engine_support()}
    assert states["ort", "cpu", "fp32"].status == "runs"
    assert (states["ort", "cuda", "fp32"].status == "runs") == (
        "CUDAExecutionProvider" in onnxruntime_providers() and cuda.local_target() is not None
    )
    pytest.importorskip("tensorrt_rtx")
    if cuda.local_target() is None:
        assert states["trt", "sm89", "fp32"].status == "builds"
        assert states["trt", "sm89", "fp32"].backend == "tensorrt_rtx"
        assert states["trt", "sm75", "fp32"].status == "refused"
        assert "no fp32 matrix product for sm75" in states["trt", "sm75", "fp32"].reason


def test_it_tells_what_is_installed_and_where() -> None:
    found = examine()
    assert found == json.loads(json.dumps(found))
    assert found["python"] == platform.python_version()
    assert [one["name"] for one in found["packages"]] == [package.distribution for package in PACKAGES]
    versions = {one["name"]: one["version"] for one in found["packages"]}
    assert versions["torch"] == torch.__version__.partition("+")[0]
    assert versions["onnx"] == onnx.__version__
    assert (found["gpu"]["target"] is None) == (cuda.local_target() is None)
    for extra, told in found["extras"].items():
        assert told["missing"] == [one["name"] for one in found["packages"] if extra in one["extras"] and not one["version"]]
        assert bool(told["install"]) == bool(told["missing"])


def test_it_imports_nothing_that_takes_long() -> None:
    code = (
        "import sys; from export.doctor import examine; examine(); "
        "print(*(name for name in ('torch', 'timm', 'onnx', 'tensorrt_rtx', 'openvino', 'sklearn') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_tables_name_every_package_engine_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    found = examine()
    found["packages"][0]["version"] = None
    found["extras"]["export"] = {"missing": ["torch"], "install": install_command("export"), "note": None}
    print_report(found)
    text = capsys.readouterr().out
    assert all(package.distribution in text for package in PACKAGES)
    assert all(target in text for target in TARGETS)
    assert f"  {install_command('export')}: torch\n" in text
    for row in found["engines"]:
        assert " ".join(row["reason"].split()) in " ".join(text.split())


def test_as_json_from_the_command_line() -> None:
    done = door_here([sys.executable, "-m", "export.console", "doctor", "--json"])
    assert done.returncode == 0
    assert set(json.loads(done.stdout)) == set(examine())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: A\nflags\t\t: fpu avx2 avx512f amx_bf16 made_up\n", ["AVX2", "AVX-512", "AMX BF16"]),
        ("Features\t: fp asimd asimddp i8mm\n", ["NEON", "NEON dot product", "I8MM"]),
        ("nothing\n", []),
    ],
)
def test_instruction_sets(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    assert instruction_sets(tmp_path / "cpuinfo") == expected
    assert instruction_sets(tmp_path / "none") == []
