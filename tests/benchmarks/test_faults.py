"""The fault harness: its short form runs and finds nothing bad; what it calls whole, half and missing is so."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults.processes import Door, Running
from benchmarks.faults.run import BAD, Row
from benchmarks.faults.things import Thing, bundle_state
from tests.helpers.bundles import make_bundle

ROOT = Path(__file__).parents[2]


def test_what_is_whole_and_what_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    assert bundle_state(folder) == "missing"
    make_bundle(folder)
    assert bundle_state(folder) == "whole"
    (folder / "plan.json").write_bytes((folder / "plan.json").read_bytes()[:-1])
    assert bundle_state(folder) == "half"
    shutil.rmtree(folder)
    thing = Thing("export", tmp_path, folder)
    (tmp_path / ".bundle.1234.part").mkdir()
    (tmp_path / ".bundle.lock").touch()
    assert (thing.state(), thing.leftovers()) == ("missing", [".bundle.1234.part"])


@pytest.mark.parametrize("fresh", [False, True])
def test_a_process_that_is_hurt(tmp_path: Path, fresh: bool) -> None:
    running = Running(Door("graph_passes.run", ["--list"]), tmp_path / "log", fresh=fresh)
    running.await_ready()
    running.hurt(signal.SIGKILL, 0)
    ended = running.wait(30)
    assert (ended.code, ended.traceback, ended.hung) == (-signal.SIGKILL, False, False)
    assert Running(Door("graph_passes.run", ["--list"]), tmp_path / "log", fresh=fresh).wait(60).code == 0
    bad = Running(Door("graph_passes.run", ["--layout", "sideways"]), tmp_path / "log", fresh=fresh).wait(60)
    row = Row("cut")
    row.count(bad, (0,), "half")
    assert (bad.code, {name: getattr(row, name) for name in BAD if getattr(row, name)}) == (2, {"half": 1, "wrong_code": 1})


@pytest.mark.slow
@pytest.mark.parametrize("door", ["slim", "cut", "validate"])  # export: races and full disks have not run yet
def test_nothing_is_ever_half(door: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.faults", "--short", "--only", door, "--output", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert done.returncode == 0, done.stdout
    assert len(rows) >= 5
    assert all(row["runs"] and not row["examples"] for row in rows)
