"""The fault harness: its short form runs and finds nothing bad; what it calls whole, half and missing is so."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.faults.processes import Door, Ended, Running
from benchmarks.faults.run import FaultOptions, FaultTable
from benchmarks.faults.scenes import BAD, DOORS, Row, Scene, UnhurtError, Workshop, scenes
from benchmarks.faults.things import SmallDisk, Thing, bundle_state, largest_file, size_of
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


def test_a_stopped_run_goes_on_with_the_next_row(tmp_path: Path) -> None:
    options = FaultOptions(short=True, only=("cut",), output=tmp_path / "rows.json")
    table = FaultTable(options)
    every = ["export: SIGKILL", "cut: SIGKILL"]
    table.add(Row("cut: SIGKILL", runs=3, finished=1), every)
    again = FaultTable(replace(options, only=("export",)))
    assert again.has("cut: SIGKILL")
    assert again.rows == table.rows
    assert not FaultTable(replace(options, seed=1)).rows  # other moments
    again.add(Row("export: SIGKILL", runs=2, hung=1), every)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["what"] for row in found["rows"]] == every
    assert (found["total"]["runs"], found["total"]["hung"], found["complete"]) == (5, 1, True)
    assert not FaultTable(options).rows  # a whole table is made anew


def test_the_committed_table_has_nothing_bad() -> None:
    table = json.loads((ROOT / "benchmarks/faults/results.json").read_text())
    rows = [Row(**row) for row in table["rows"]]
    known = {scene.what for scene in scenes(short=False, doors=DOORS, mounts=True)}
    assert {row.what for row in rows} <= known
    assert table["complete"] is ({row.what for row in rows} == known)
    assert [(row.what, row.bad) for row in rows if row.bad] == []
    assert sum(row.runs for row in rows) == table["total"]["runs"] > 0
    assert not any(row.examples for row in rows)


def test_a_command_that_fails_unhurt_is_counted() -> None:
    def play(shop: Workshop, row: Row) -> None:
        row.count(Ended(0, "", hung=False, seconds=1.0), (0,), "whole")
        raise UnhurtError(Door("cut.run", []), Ended(2, "no such file", hung=False, seconds=1.0))

    row = Scene("cut: SIGKILL", play).row(object.__new__(Workshop))
    assert (row.runs, row.bad, row.wrong_code) == (1, 1, 1)
    assert "fails unhurt: exit 2: no such file" in row.examples[0]


def test_a_small_disk_has_the_room_that_was_left(tmp_path: Path) -> None:
    mounts = SmallDisk.may_mount(tmp_path / "trial")
    with SmallDisk(tmp_path / "disk", mounts=mounts) as disk:
        (disk.folder / "there").write_bytes(bytes(100_000))
        disk.leave(8192)
        if mounts:
            (disk.folder / "fits").write_bytes(bytes(4096))
            with pytest.raises(OSError, match="No space"):
                (disk.folder / "more").write_bytes(bytes(100_000))
        assert size_of(disk.folder) >= 100_000 == largest_file(disk.folder)
    assert not mounts or not list((tmp_path / "disk").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_nothing_is_ever_half(door: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.faults", "--short", "--only", door, "--output", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert done.returncode == 0, done.stdout
    assert len(rows) >= 5
    assert all(row["runs"] and not row["examples"] for row in rows)
