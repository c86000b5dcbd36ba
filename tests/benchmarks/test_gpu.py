"""``python -m benchmarks.gpu.run --tiny``: the same steps as on a GPU, with a small model on the CPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.gpu import speed
from benchmarks.gpu.run import GpuOptions, epochs_within, measure_on_gpu
from patchslim.errors import InputRejected, Unavailable, UsageError
from tests.helpers.commands import door_here


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu") / "gpu.json"


@pytest.fixture(scope="module")
def results(output: Path) -> dict[str, Any]:
    done = door_here([sys.executable, "-m", "benchmarks.gpu.run", "--tiny", "--output", str(output)])
    assert done.returncode == 0, done.stderr
    written: dict[str, Any] = json.loads(output.read_text())
    assert json.loads(done.stdout) == written
    return written


def test_accuracy_is_measured_before_and_after_fine_tuning(results: dict[str, Any], output: Path) -> None:
    dense, plan, finetuned = results["accuracy"]
    assert (dense["method"], dense["reduction"], dense["agreement"]) == ("dense", 0, 1)
    assert (plan["method"], plan["fit"], plan["finetune"]) == ("similarity", "closed-form", None)
    assert plan["reduction"] == finetuned["reduction"] >= 0.4
    assert finetuned["finetune"]["precision"] == "bf16"
    assert finetuned["finetune"]["epochs"] == results["finetune_epochs"]
    assert finetuned["kl"] != plan["kl"]
    tables = json.loads(output.with_name("gpu-accuracy.json").read_text())
    assert [row["top1"] for row in tables["rows"]] == [row["top1"] for row in results["accuracy"]]
    assert not list(output.parent.glob("*.part"))


def test_slim_and_dense_are_timed_side_by_side_and_what_is_not_says_why(results: dict[str, Any]) -> None:
    assert results["device"]["kind"] == "cpu"
    assert results["device"]["name"] == results["device"]["cpu"] != ""
    rows = results["pytorch"]
    assert [(row["dtype"], row["batch"]) for row in rows] == [("fp16", 1), ("fp16", 2), ("bf16", 1), ("bf16", 2)]
    for row in rows + results["onnxruntime"]:
        assert row["speedup_p10"] <= row["speedup"] <= row["speedup_p90"]
        assert min(row["dense_ms"], row["slim_ms"]) > 0
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["macs_ratio"])
        assert row["macs_ratio"] == pytest.approx(1 / (1 - results["accuracy"][1]["reduction"]), rel=1e-5)
    assert {row["provider"] for row in results["onnxruntime"]} == {"CPUExecutionProvider"}
    if not torch.cuda.is_available():
        assert results["tensorrt"] == {"not_executed": "no CUDA driver or no visible GPU on this machine"}


def test_a_second_call_measures_only_what_is_missing(results: dict[str, Any], output: Path, tmp_path: Path) -> None:
    for name in ("gpu.json", "gpu-accuracy.json"):
        (tmp_path / name).write_text(output.with_name(name).read_text())
    shortened = {name: value for name, value in results.items() if name != "pytorch"}
    shortened["onnxruntime"] = "measured before"
    (tmp_path / "gpu.json").write_text(json.dumps(shortened))
    again = measure_on_gpu(GpuOptions(tiny=True, output=tmp_path / "gpu.json"))
    assert again["onnxruntime"] == "measured before"
    assert again["accuracy"] == results["accuracy"]
    assert [row["batch"] for row in again["pytorch"]] == [1, 2, 1, 2]


def test_results_of_another_device_are_not_mixed_in(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({**results, "device": {**results["device"], "name": "NVIDIA H100"}}))
    with pytest.raises(InputRejected, match="results of NVIDIA H100"):
        measure_on_gpu(GpuOptions(tiny=True, output=tmp_path / "gpu.json"))
    (tmp_path / "gpu.json").write_text("[]")
    with pytest.raises(InputRejected, match="not a results file"):
        measure_on_gpu(GpuOptions(tiny=True, output=tmp_path / "gpu.json"))


def test_the_epochs_fill_each_budgets_share_of_the_minutes() -> None:
    class Draw:
        """What a fine-tune of 1,000 images in 10 seconds reports."""

        def found(self, case: Any) -> Any:
            assert case.finetune["epochs"] == pytest.approx(4 * 250 / 50_000)
            return dataclasses.make_dataclass("Found", ["finetune"])({"images": 1000, "seconds": 10.0})

    options = GpuOptions(minutes=5, budgets=(0.45, 0.462), train_images=50_000, probe_steps=4, finetune_batch_size=250)
    bench: Any = dataclasses.make_dataclass("Bench", ["options"])(options.of_tables())
    assert epochs_within(options, bench, Draw()) == pytest.approx(60 * 2.5 * 100 / 50_000, abs=1e-3)  # type: ignore[arg-type]
    assert bench.options == options.of_tables()


def test_ratios_are_taken_within_each_round() -> None:
    found = speed.compared([[0.2, 0.1], [0.4, 0.2], [0.9, 0.3]], 2.5)
    assert found["speedup"] == pytest.approx(2)
    assert (found["dense_ms"], found["slim_ms"]) == pytest.approx((400, 200))
    assert found["efficiency"] == pytest.approx(0.8)


@pytest.mark.parametrize("wrong", [{"minutes": -1}, {"batches": ()}, {"batches": (0,)}, {"rounds": 0}, {"budgets": (1.0,)}])
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        GpuOptions(**wrong).check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_runs_instead(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="--tiny runs on a CPU"):
        measure_on_gpu(GpuOptions(output=tmp_path / "gpu.json"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_captured_graph_replays_the_model_and_events_time_it() -> None:
    model, images = nn.Linear(8, 8).cuda(), torch.ones(4, 8, device="cuda")
    for run in (speed.eager(model, images), speed.captured(model, images)):
        assert speed.gpu_seconds(run)() > 0
