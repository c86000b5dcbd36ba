"""Readers with faults, for ``benchmarks.fuzz`` to find: one for each bad outcome, and one that is sound."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from random import Random

from benchmarks.fuzz.target import Files, Target
from patchslim.errors import InputRejected


def _valid() -> Files:
    return {"number": b"-1"}


def _make(rng: Random) -> Files:
    return {"number": str(rng.randrange(10)).encode()}


def _number(folder: Path) -> int:
    number = int((folder / "number").read_text())
    if number > 7:
        refusal = InputRejected("more than 7")
        raise refusal from refusal
    return number


def _undocumented(folder: Path) -> None:
    if _number(folder) == 3:
        raise KeyError("three")


def _crash(folder: Path) -> None:
    if _number(folder) == 3:
        os.kill(os.getpid(), signal.SIGSEGV)


def _hang(folder: Path) -> None:
    while _number(folder) == 3:
        pass


def _memory(folder: Path) -> None:
    if _number(folder) == 3:
        try:
            bytearray(1 << 40)
        except MemoryError as error:
            raise InputRejected("too large") from error


TARGETS = (
    Target("sound", 4, _valid, _make, _number),
    Target("undocumented", 4, _valid, _make, _undocumented),
    Target("crash", 2, _valid, _make, _crash),
    Target("hang", 3, _valid, _make, _hang),
    Target("memory", 4, _valid, _make, _memory),
)
