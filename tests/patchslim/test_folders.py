"""Temporary files and folders, locks and exchanges: what a killed process leaves is swept, and nothing is half there."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from patchslim import folders
from patchslim.folders import disk_full, exchange, leftovers, locked, temporary_file, temporary_folder, temporary_form
from patchslim.records import atomic_path
from tests.helpers.interruptions import interruptions

FORM = temporary_form(r"\.bundle\.", ".part")

KILLED = """
import os, signal, sys
from pathlib import Path
from patchslim.folders import temporary_file, temporary_folder
above = Path(sys.argv[1])
with temporary_folder(".bundle.", ".part", above) as folder, temporary_file(above / "plan.json") as part:
    (folder / "half").write_text("of it")
    part.write_text("half")
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("ready", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_is_found(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "kill"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    with atomic_path(tmp_path / "plan.json") as part:
        part.write_text("whole")
    found = list(leftovers(FORM, tmp_path))
    assert [(path.suffix, (path / "half").read_text()) for path in found] == [(".part", "of it")]
    assert names(tmp_path) == [found[0].name, "plan.json"]


def test_what_a_running_process_holds_is_left_alone(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), "wait"], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    before = names(tmp_path)
    assert list(leftovers(FORM, tmp_path)) == []
    with atomic_path(tmp_path / "plan.json") as part:
        part.write_text("ours")
    assert names(tmp_path) == sorted([*before, "plan.json"])
    process.communicate("")
    assert names(tmp_path) == ["plan.json"]


def test_other_names_are_not_leftovers(tmp_path: Path) -> None:
    for name in (".bundle.notes.part", ".bundle.2.0123456789abcdef.part", "bundle.0123456789abcdef.part"):
        (tmp_path / name).mkdir()
    (tmp_path / ".bundle.0123456789abcdef.part").symlink_to(tmp_path / "elsewhere")
    assert list(leftovers(FORM, tmp_path)) == []


def test_two_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system cannot exchange two folders")
    assert [(tmp_path / name / "file").read_text() for name in ("one", "other")] == ["other", "one"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "nowhere")


def test_a_lock_is_waited_for_and_then_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchslim.folders.PATIENCE_S", 0.1)
    with locked(tmp_path), pytest.raises(TimeoutError, match="locked by another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        assert names(tmp_path) == []


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "weights.safetensors") as part:
            save_file({}, part)
        with temporary_folder(".stage.", "", tmp_path) as folder:
            assert folder.stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "x"), False),
        (ValueError("a bug"), False),
    ],
)
def test_a_full_disk_is_known_whoever_says_it(tmp_path: Path, error: Exception, full: bool) -> None:
    assert disk_full(error, tmp_path) is full


def test_a_part_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), temporary_file(tmp_path / "plan.json") as part:
        fail(part)
    assert names(tmp_path) == []


def test_an_interrupt_at_any_moment_leaves_nothing(tmp_path: Path) -> None:
    left: list[str] = []

    def work() -> None:
        with temporary_folder(".bundle.", ".part", tmp_path) as folder, temporary_file(tmp_path / "plan.json") as part:
            for name in ("a", "b"):
                (folder / name).mkdir()
                (folder / name / "file").write_text("x")
            part.write_text("y")

    moments = interruptions(work, (folders, shutil), lambda: left.extend(names(tmp_path)))
    assert left == []
    assert moments > 50
