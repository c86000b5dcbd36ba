"""``python -m benchmarks.gpu.engines --tiny``: the same steps as on a GPU, with a small model on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.gpu import speed
from benchmarks.gpu.engines import EnginesOptions, measure_engines
from patchslim.errors import InputRejected, Unavailable, UsageError
from tests.helpers.commands import door_here


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu") / "engines.json"


@pytest.fixture(scope="module")
def results(output: Path) -> dict[str, Any]:
    done = door_here([sys.executable, "-m", "benchmarks.gpu.engines", "--tiny", "--output", str(output)])
    assert done.returncode == 0, done.stderr
    written: dict[str, Any] = json.loads(output.read_text())
    assert json.loads(done.stdout) == written
    return written


def test_slim_and_dense_are_timed_side_by_side_and_what_is_not_says_why(results: dict[str, Any]) -> None:
    assert results["device"]["kind"] == "cpu"
    assert results["device"]["name"] == results["device"]["cpu"] != ""
    rows = results["pytorch"]
    assert [(row["dtype"], row["batch"]) for row in rows] == [("fp16", 1), ("fp16", 2), ("bf16", 1), ("bf16", 2)]
    for row in rows + results["onnxruntime"]:
        assert row["speedup_p10"] <= row["speedup"] <= row["speedup_p90"]
        assert min(row["dense_ms"], row["slim_ms"]) > 0
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["macs_ratio"])
        assert row["macs_ratio"] == pytest.approx(1 / (1 - results["reduction"]), rel=1e-5)
    assert {row["provider"] for row in results["onnxruntime"]} == {"CPUExecutionProvider"}
    if not torch.cuda.is_available():
        assert results["tensorrt"] == {"not_executed": "no CUDA driver or no visible GPU on this machine"}


def test_a_second_call_measures_only_what_is_missing(results: dict[str, Any], tmp_path: Path) -> None:
    shortened = {name: value for name, value in results.items() if name != "pytorch"}
    shortened["onnxruntime"] = "measured before"
    (tmp_path / "engines.json").write_text(json.dumps(shortened))
    again = measure_engines(EnginesOptions(tiny=True, output=tmp_path / "engines.json"))
    assert again["onnxruntime"] == "measured before"
    assert again["counts"] == results["counts"]
    assert [row["batch"] for row in again["pytorch"]] == [1, 2, 1, 2]


def test_results_of_another_device_are_not_mixed_in(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "engines.json").write_text(json.dumps({**results, "device": {**results["device"], "name": "NVIDIA H100"}}))
    with pytest.raises(InputRejected, match="results of NVIDIA H100"):
        measure_engines(EnginesOptions(tiny=True, output=tmp_path / "engines.json"))
    (tmp_path / "engines.json").write_text("[]")
    with pytest.raises(InputRejected, match="not a results file"):
        measure_engines(EnginesOptions(tiny=True, output=tmp_path / "engines.json"))


def test_ratios_are_taken_within_each_round() -> None:
    found = speed.compared([[0.2, 0.1], [0.4, 0.2], [0.9, 0.3]], 2.5)
    assert found["speedup"] == pytest.approx(2)
    assert (found["dense_ms"], found["slim_ms"]) == pytest.approx((400, 200))
    assert found["efficiency"] == pytest.approx(0.8)


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}, {"rounds": 0}, {"budgets": (1.0,)}])
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        EnginesOptions(**wrong).check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_runs_instead(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="--tiny runs on a CPU"):
        measure_engines(EnginesOptions(output=tmp_path / "engines.json"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_captured_graph_replays_the_model_and_events_time_it() -> None:
    model, images = nn.Linear(8, 8).cuda(), torch.ones(4, 8, device="cuda")
    for run in (speed.eager(model, images), speed.captured(model, images)):
        assert speed.gpu_seconds(run)() > 0
