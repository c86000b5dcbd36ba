"""What can go wrong around any command: signals, full disks, closed pipes, odd names. A message, an exit code, no traceback."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from patchslim.cli import run_command
from patchslim.environment import processes
from patchslim.errors import BudgetUnreachable, InputRejected, ParityFailed, PatchslimError, UsageError
from tests.helpers.commands import kept_signals

ROOT = Path(__file__).parents[2]
CUT = (sys.executable, "-m", "graph_passes.run")
DOORS = ("export.run", "slimming.run", "graph_passes.run", "validate.run", "export.doctor", "export.console")


@dataclasses.dataclass(frozen=True)
class Paint:
    """Paint."""

    json: bool = False
    """One object."""
    coats: int = 1
    """How many."""


def command(main: Callable[[Paint], int], *arguments: str) -> int:
    with kept_signals(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["paint", *arguments])
        return run_command(Paint, main, prog="paint", description="Paint.")


def failing(error: BaseException) -> Callable[[Paint], int]:
    def main(options: Paint) -> int:
        raise error

    return main


def chained(outer: BaseException, inner: BaseException) -> BaseException:
    outer.__cause__ = inner
    return outer


def door(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    more = {"cwd": ROOT, "stdout": subprocess.PIPE} | more
    return subprocess.run([*CUT, *arguments], stderr=subprocess.PIPE, text=True, timeout=120, **more)


FULL = OSError(errno.ENOSPC, "No space left on device", "/disk/file")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FULL, 2, "/disk/file: no space is left there: free some, or name another place"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "a file could not be written: the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only file system", "/cdrom"), 2, "/cdrom: it cannot be written to"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "no space is left there"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), 2, "no space is left there"),
        (chained(InputRejected("model: not read"), FULL), 2, "/disk/file: no space is left there"),
        (chained(UsageError("--output x: cannot be written"), FULL), 2, "paint: --output x: cannot be written\n"),
        (chained(InputRejected("a: no plan"), OSError(errno.ENAMETOOLONG, "File name too long", "a")), 3, "a: no plan"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaaa"), 2, "aaaa: the name is too long"),
        (PermissionError(errno.EACCES, "Permission denied", "/place/x"), 4, "/place/x: permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_system_refuses_is_a_message(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(failing(error)) == code
    assert said in capsys.readouterr().err


def test_anything_else_is_a_bug_and_says_so_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        command(failing(ZeroDivisionError("division by zero")), "--json")
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {
        "code": 1,
        "kind": "PatchslimError",
        "message": "ZeroDivisionError: division by zero",
        "next": "report it: this is a bug",
    }


class GateFailed(ParityFailed):
    """A kind of its own within a room."""

    found: ClassVar[Mapping[str, object]] = {"rungs": [1, 2]}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            BudgetUnreachable("no plan removes 0.9; pass a smaller budget"),
            {"code": 6, "kind": "BudgetUnreachable", "message": "no plan removes 0.9", "next": "pass a smaller budget"},
        ),
        (
            InputRejected("x: not a plan", next_step="make one"),
            {"code": 3, "kind": "InputRejected", "message": "x: not a plan", "next": "make one"},
        ),
        (
            InputRejected("x: passes nothing: 3 blocks"),
            {"code": 3, "kind": "InputRejected", "message": "x: passes nothing: 3 blocks", "next": None},
        ),
        (GateFailed("it lost"), {"code": 5, "kind": "ParityFailed", "message": "it lost", "next": None}),
        (FULL, {"code": 2, "kind": "UsageError", "message": "/disk/file: no space is left there"}),
        (KeyboardInterrupt(), {"code": 130, "kind": "Interrupted", "next": "give the same command again: it resumes"}),
    ],
)
def test_json_prints_an_error_object(
    error: BaseException, expected: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(failing(error), "--json") == expected["code"]
    printed = json.loads(capsys.readouterr().out)
    assert expected.items() <= printed.pop("error").items()
    assert printed == (error.found or {} if isinstance(error, PatchslimError) else {})


def test_json_prints_an_error_object_for_options_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(failing(AssertionError()), "--json", "--coats", "many") == 2
    shown = capsys.readouterr()
    error = json.loads(shown.out)["error"]
    assert (error["code"], error["kind"], error["next"]) == (2, "UsageError", "see paint --help")
    assert "--coats" in error["message"]
    assert not {"│", "╭", "\n"} & set(error["message"])
    assert "--coats" in shown.err


def test_a_message_cannot_move_the_cursor_or_fill_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(failing(InputRejected("\x1b[2Jbad\rname: " + "long " * 10_000))) == 3
    said = capsys.readouterr().err
    assert said.startswith("paint: \\x1b[2Jbad\\x0dname: long")
    assert len(said) < 2000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("door", DOORS)
def test_a_signal_while_modules_load_is_130_without_a_traceback(door: str, number: int, tmp_path: Path) -> None:
    # A package that never finishes loading stands for one that takes long to.
    (tmp_path / "tyro").mkdir()
    (tmp_path / "tyro" / "__init__.py").write_text("print('loading', flush=True)\nimport time\nwhile True: time.sleep(0.1)")
    arguments = ["cut", "--list"] if door == "export.console" else []
    process = subprocess.Popen(
        [sys.executable, "-m", door, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, len(said.splitlines())) == (130, 1)
    assert "interrupted; nothing was" in said


def test_an_interrupt_inside_the_code_that_a_library_writes_is_130_too(tmp_path: Path) -> None:
    """CPython ends ``python -m`` by SIGINT, whatever the exit code, after a KeyboardInterrupt that left ``exec`` of a text."""
    script = """
import dataclasses, os, signal, sys
from patchslim.cli import run_command

@dataclasses.dataclass(frozen=True)
class Paint:
    json: bool = False

def main(options):
    exec("os.kill(os.getpid(), signal.SIGTERM)\\nfor _ in range(10**9): pass")

sys.exit(run_command(Paint, main, prog="paint", description="Paint."))
"""
    (tmp_path / "paint.py").write_text(script, encoding="utf-8")
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "paint"], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (130, 1), done.stderr


def test_what_libraries_make_of_an_interrupt_is_not_shown(tmp_path: Path) -> None:
    """They log it as an error with its traceback, and objects that were half made fail in their finalisers."""
    script = """
import dataclasses, logging, os, signal, sys
from patchslim.cli import run_command

@dataclasses.dataclass(frozen=True)
class Paint:
    coats: int = 1

class HalfMade:
    def __del__(self):
        self.brush.close()

kept = []

def main(options):
    HalfMade()  # before an interrupt that is a bug, and told
    kept.append(HalfMade())
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            pass
    except KeyboardInterrupt:
        logging.getLogger("library").exception("cannot paint")
        HalfMade()
        raise

sys.exit(run_command(Paint, main, prog="paint", description="Paint."))
"""
    (tmp_path / "paint.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "paint.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 130
    assert done.stderr.count("Traceback") == done.stderr.count("Exception ignored in") == 1
    assert done.stderr.splitlines()[-1].startswith("paint: interrupted")


def test_logging_goes_on_after_an_interrupted_command(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def main(options: Paint) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    assert command(main) == 130
    logging.getLogger("library").error("a fault of its own")
    assert "a fault of its own" in caplog.text


def test_a_signal_while_a_command_runs_is_130_even_if_a_library_swallows_it(capsys: pytest.CaptureFixture[str]) -> None:
    def main(options: Paint) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ImportError("a library's own error") from None
        return 0

    assert command(main) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_signal_after_the_work_is_done_changes_nothing() -> None:
    def main(options: Paint) -> int:
        return 0

    with kept_signals(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["paint"])
        assert run_command(Paint, main, prog="paint", description="Paint.") == 0
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("arguments", [["--list"], ["--help"], ["--json", "no-such.onnx", "--passes", "fold_constants"]])
def test_a_reader_that_leaves_changes_no_exit_code(arguments: list[str]) -> None:
    expected = door(*arguments).returncode
    reader, writer = os.pipe()
    os.close(reader)
    done = door(*arguments, stdout=writer)
    os.close(writer)
    assert done.returncode == expected
    assert not {"Traceback", "BrokenPipeError", "Exception ignored"} & set(done.stderr.split())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_stdout_is_exit_code_2(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = door("--list", stdout=full)
        failed = door("--json", str(tmp_path / "no.onnx"), "--passes", "fold_constants", stdout=full)
    assert done.returncode == 2
    assert done.stderr == "graph_passes.run: stdout cannot be written: No space left on device; the rest is done\n"
    assert failed.returncode == 3  # what was found counts more


def test_closed_standard_streams() -> None:
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *CUT, "--list"], cwd=ROOT, timeout=120)
    assert done.returncode == 0


def test_a_working_directory_that_is_gone_is_exit_code_2(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", gone, *CUT, "--list"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == "graph_passes.run: the working directory is gone: cd to one that exists\n"


def test_a_name_that_is_no_utf8_is_exit_code_2() -> None:
    done = subprocess.run([*map(os.fsencode, CUT), b"caf\xe9.onnx"], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(b"graph_passes.run: argument caf\\xe9.onnx: is not UTF-8: ")


def test_a_terminal_that_cannot_show_a_character_stops_nothing(tmp_path: Path) -> None:
    model = tmp_path / "modèle.onnx"
    model.touch()
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    done = door(str(model), "--passes", "fold_constants", env=ascii_only)
    assert done.returncode == 3, done.stderr
    assert "mod\\xe8le.onnx" in done.stderr


@pytest.mark.parametrize("given", ["abc", "0", "-1", "1.5"])
def test_environment_variables_of_torchrun_that_cannot_be_read(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(UsageError, match=f"WORLD_SIZE={given}: must be a whole number from 1.*unset it"):
        processes()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes() == 4
