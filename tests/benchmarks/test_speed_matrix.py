"""The speed matrix: what it times, as a whole at tiny size, and what it says of what fails."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from benchmarks.speed.contender import Contender, ContenderProcess
from benchmarks.speed.contenders import PLAIN
from benchmarks.speed.matrix import MatrixOptions, measure_matrix, speed_of
from benchmarks.speed.matrix_report import draw, markdown, read
from patchslim.errors import InputRejected, UsageError

ROOT = Path(__file__).parents[2]


def test_a_speed_is_the_median_of_ratios_and_not_the_ratio_of_medians() -> None:
    plain, own = np.array([1.0, 2.0, 30.0]), np.array([0.5, 2.0, 10.0])
    found = speed_of(own, plain, 8)
    assert found["speedup"] == 2.0
    assert found["ms"] == 2000.0
    assert found["images_per_s"] == 4.0
    assert (found["speedup_p25"], found["speedup_p75"]) == (1.5, 2.5)


def test_what_does_not_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    np.save(tmp_path / "images.npy", np.zeros((2, 3, 8, 8), np.float32))
    broken = Contender(
        "broken", "ours", "onnxruntime", {1: str(tmp_path / "model.onnx")}, str(tmp_path / "images.npy"), multiplies="fp32"
    )
    with ContenderProcess(broken) as process:
        for _ in range(2):  # and goes on to say so
            with pytest.raises(RuntimeError, match=r"broken: .*model\.onnx: ONNX Runtime cannot load it"):
                process.seconds(1)


def test_a_process_that_ends_is_a_fault() -> None:
    with ContenderProcess(Contender("gone", "ours", "gemm", threads=1)) as process:
        process._process.kill()
        process._process.wait()
        with pytest.raises(RuntimeError, match="gone: its process ended"):
            process.seconds(1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budgets": (1.0,)}, "--budgets"),
        ({"batches": (0,)}, "--batches"),
        ({"rounds": 0}, "--rounds"),
        ({"prepare": True}, "--work"),
        ({"trained": False, "sizes": ()}, "--no-trained leaves nothing"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_made(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        measure_matrix(MatrixOptions(**options))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"models": [{"rows": [{"group": "theirs"}]}]}')
    with pytest.raises(InputRejected, match="not a results file"):
        read(tmp_path / "other.json")


def test_every_row_of_the_page_is_in_the_results() -> None:
    (model,) = read(ROOT / "benchmarks/speed/matrix.json")["models"]
    known = {tuple(_cells(row)) for row in model["rows"]}
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    table = text.partition("| batch 1 | batch 8 | batch 32 | top-1")[2].partition("\n\n")[0]
    shown = [line.strip("| ").split(" | ")[-4:] for line in table.splitlines()[2:]]
    assert len(shown) >= 10
    assert [cells for cells in shown if tuple(cells) not in known] == []
    assert f"All {len(model['rows'])} rows" in text
    for name, backend in (("ONNX Runtime, FP32", "in ONNX Runtime"), ("OpenVINO, bfloat16", "in OpenVINO, bf16")):
        assert f"| {name} | {' | '.join(_shares(model, backend))} |" in text


def test_the_page_says_of_vit_s_what_its_results_do() -> None:
    (model,) = read(ROOT / "benchmarks/speed/matrix-vit_small.json")["models"]
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    rows = {row["name"]: row for row in model["rows"]}
    assert f"Its {len(rows)} rows" in text
    backends = {"ONNX Runtime, FP32": "in ONNX Runtime", "OpenVINO, FP32": "in OpenVINO, fp32"}
    backends |= {"OpenVINO, bfloat16": "in OpenVINO, bf16", "OpenVINO, INT8 and bfloat16": "in OpenVINO, int8"}
    for name, backend in backends.items():
        speeds = [rows[f"ours, -45%, {backend}"]["speed"][batch] for batch in ("1", "8")]
        times, gained = (
            f"{speeds[0]['speedup']:.2f}, {speeds[1]['speedup']:.2f}",
            ", ".join(_shares(model, backend, ("1", "8"))),
        )
        rate = " %".join(
            [", ".join(f"{100 * one['gemm_share']:.0f}" for one in speeds if "gemm_share" in one), ""]
        ).removeprefix(" %")
        assert f"| {name} | {times} | {gained} | {rate}".rstrip() in text


def test_the_readme_has_the_same_numbers() -> None:
    (model,) = read(ROOT / "benchmarks/speed/matrix.json")["models"]
    at_8 = {row["name"]: f"{row['speed']['8']['speedup']:.2f}" for row in model["rows"]}
    ours = [at_8[f"ours, -45%, in {backend}"] for backend in ("ONNX Runtime", "OpenVINO, bf16", "OpenVINO, int8")]
    dense = [at_8[f"timm export in OpenVINO, {precision}"] for precision in ("bf16", "int8")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = r"{} times as fast .*?, {} times by\n.*? and {} times by `int8`; dense, OpenVINO has {} and {}:"
    assert re.search(said.format(*(re.escape(number) for number in (*ours, *dense))), readme)


def _cells(row: dict[str, Any]) -> list[str]:
    return [*(f"{row['speed'][batch]['speedup']:.2f}" for batch in ("1", "8", "32")), f"{100 * row['top1']:.1f}"]


def _shares(model: dict[str, Any], backend: str, batches: Sequence[str] = ("1", "8", "32")) -> list[str]:
    rows = {row["name"]: row for row in model["rows"]}
    dense, slim = rows[f"timm export {backend}"], rows[f"ours, -45%, {backend}"]
    ratio = model["dense_macs"] / slim["macs"]
    speeds = [[row["speed"][batch]["speedup"] for row in (slim, dense)] for batch in batches]
    return [f"{fast / slow / ratio:.2f}" for fast, slow in speeds]


@pytest.mark.slow
def test_the_whole_matrix_at_tiny_size(tmp_path: Path) -> None:
    output = tmp_path / "matrix.json"
    measure_matrix(MatrixOptions(data="digits", tiny=True, compiled=False, output=output))
    (model,) = read(output)["models"]
    names = [row["name"] for row in model["rows"]]
    assert not [row for row in model["rows"] if "fault" in row]
    assert names[0] == PLAIN
    assert {row["speed"][batch]["speedup"] for row in model["rows"][:1] for batch in ("1", "2")} == {1.0}
    for part in (
        "PyTorch eager",
        "optimiser",
        "OpenVINO, bf16",
        "OpenVINO, int8",
        "at 32 px",
        "ToMe",
        "EViT",
        "ours, -40%, in OpenVINO, int8",
    ):
        assert any(part in name for name in names), part
    ours = next(row for row in model["rows"] if row["name"] == "ours, -40%, in ONNX Runtime")
    assert ours["macs"] <= 0.6 * model["dense_macs"]
    assert all(("gemm_share" in row["speed"]["2"]) == (row["multiplies"] != "int8") for row in model["rows"])
    table = markdown(read(output))
    assert table.count("| **ours, -40%") == len([name for name in names if name.startswith("ours")])
    draw(read(output), tmp_path / "matrix.svg")
    assert (tmp_path / "matrix.svg").stat().st_size > 10_000


@pytest.mark.parametrize("options", [{"trained": False}, {"tiny": True, "rounds": 3}, {"sizes": (), "compiled": False}])
def test_the_command_that_results_name_gives_these_options(options: dict[str, Any]) -> None:
    made = MatrixOptions(**options)
    words = shlex.split(made.command())
    assert words[:3] == ["python", "-m", "benchmarks.speed.matrix"]
    assert tyro.cli(MatrixOptions, args=words[3:]) == made
