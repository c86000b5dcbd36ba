"""Progress: bars on a terminal, and in a log lines that never stop for long."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from patchslim.progress import Reporter


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> Reporter:
    monkeypatch.setattr("patchslim.progress.INTERVAL_S", 0.1)
    reporter = Reporter()
    reporter.console = Console(file=io.StringIO(), force_terminal=False, width=40)
    return reporter


def shown(reporter: Reporter) -> str:
    assert isinstance(reporter.console.file, io.StringIO)
    return reporter.console.file.getvalue()


def test_a_log_does_not_fall_silent(reporter: Reporter) -> None:
    with reporter.alive():
        reporter.say("exporting the dense model to ONNX")
        time.sleep(0.35)
        with reporter.bar("parity") as update:
            update(3, 12)
            time.sleep(0.35)
            update(12, 12)
    lines = shown(reporter).splitlines()
    assert lines[0] == "exporting the dense model to ONNX"
    assert sum(line.startswith("exporting the dense model to ONNX (") for line in lines) >= 2
    assert sum(line.startswith("parity 3/12") for line in lines) >= 2
    assert lines[-1].startswith("parity 12/12")
    assert lines[-1].endswith("in 0 s")
    time.sleep(0.25)
    assert shown(reporter).splitlines() == lines


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_without_a_step_leaves_nothing(reporter: Reporter, terminal: bool) -> None:
    reporter.console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with reporter.bar("building engines", unit=""):
        pass
    left = shown(reporter).rpartition("\x1b[2K")[2] if terminal else shown(reporter)
    assert "building engines" not in left
    assert "0/?" not in left


def test_a_long_line_is_one_line(reporter: Reporter) -> None:
    reporter.say("a path " * 20)
    assert shown(reporter).count("\n") == 1


def test_stages_are_named_one_after_the_other(reporter: Reporter) -> None:
    with reporter.stages("points") as update:
        for stage in ("cutting", "timing"):
            for done in (1, 2):
                update(stage, done, 2)
    assert [line.partition(" in ")[0] for line in shown(reporter).splitlines()] == ["cutting 2/2", "timing 2/2"]
