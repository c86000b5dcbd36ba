"""``python -m benchmarks.passes``: its plan, its memory watch, and a run of the smallest model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from timm.layers import config

from benchmarks.speed.passes import SIZES, MemoryWatch, export, memory, random_plan

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read in the way of Linux")


@pytest.mark.parametrize("size", ["Ti", "S", "B", "L", "g"])
@pytest.mark.parametrize("share", [0.3, 0.45, 0.7])
def test_a_random_plan_has_the_share_of_macs_that_was_asked_for(size: str, share: float) -> None:
    plan = random_plan(SIZES[size], share)
    assert plan.macs() / plan.dense_macs() == pytest.approx(share, abs=0.02)
    assert plan.depth == SIZES[size].depth
    assert plan.kept[-1] == [0]


@on_linux
def test_the_watch_sees_memory_that_was_given_back() -> None:
    before = memory("RssAnon")
    with MemoryWatch() as watch:
        block = np.ones(2**25)
        while watch.peak < before + 2**27:  # until the watch has looked
            block[0] += 1
        del block
    assert memory("RssAnon") < before + 2**27
    assert memory("VmHWM") >= watch.peak


@on_linux
def test_the_command_measures_the_smallest_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, work = tmp_path / "results.json", tmp_path / "work"
    dense = work / "test" / "dense" / "dense.onnx"
    dense.parent.mkdir(parents=True)
    monkeypatch.setattr(config, "_USE_FUSED_ATTN", config._USE_FUSED_ATTN)  # an export sets it, for good
    export(SIZES["test"], dense)  # the command would, in a process that imports torch for it
    command = [
        sys.executable,
        "-m",
        "benchmarks.passes",
        "--sizes",
        "test",
        "--rounds",
        "1",
        "--work",
        work,
        "--output",
        output,
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    (row,) = results["rows"]
    (measured,) = row["rounds"]
    assert row["model_bytes"] == dense.stat().st_size
    assert row["name"] in done.stdout
    assert measured["nodes"]["dense"] > 40
    assert measured["total"]["cpu_s"] == pytest.approx(sum(stage["cpu_s"] for stage in measured["stages"].values()), abs=1e-6)
    assert measured["peak_resident_bytes"] > measured["peak_private_bytes"] > 0
    assert "cut_tokens" in measured["each_pass_alone_cpu_s"]
    assert "--sizes test" in results["command"]
    assert not (work / "test" / "slim").exists()
