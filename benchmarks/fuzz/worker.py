"""A process that reads inputs under a memory limit: requests come on stdin, answers go to stdout, one JSON line each.

Before each input it writes the input's number where the process that started it can see it, so that one which kills or stops
this process is known. ``python -m benchmarks.fuzz.worker MODULE FOLDER MEMORY_MIB``; Linux only.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import signal
import struct
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.fuzz.cases import BAD, Outcome, files_of, outcome_of, remove, targets_of, write
from benchmarks.fuzz.target import Target

#: Bad inputs that one answer tells of; further ones are counted.
MOST_TOLD = 20
NUMBER = struct.Struct("<q")


def main(module: str, folder: Path, memory: int) -> None:
    """Answer requests until stdin ends. ``memory``: MiB that one reading may take on top of what the process has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    faulthandler.enable()
    warnings.simplefilter("ignore")
    targets, warm = targets_of(module), set[str]()
    with (folder / "number").open("r+b") as file:
        number = mmap.mmap(file.fileno(), NUMBER.size)
    for line in sys.stdin:
        request = json.loads(line)
        target = targets[request["target"]]
        if target.name not in warm:
            _warm_up(target, folder / "case")
            warm.add(target.name)
        _limit(memory)
        answer = _run(target, folder / "case", number, request["seed"], request["start"], request["stop"])
        _limit(None)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(target: Target, folder: Path, number: mmap.mmap, seed: int, start: int, stop: int) -> dict[str, Any]:
    counts, slowest, seconds = Counter[str](), 0.0, 0.0
    told: list[dict[str, Any]] = []
    before = _reset_peak()
    for index in range(start, stop):
        number[:] = NUMBER.pack(index)
        files = files_of(target, seed, index)
        write(folder, files)
        outcome = outcome_of(target, folder)
        remove(folder, files)
        counts[outcome.kind] += 1
        slowest, seconds = max(slowest, outcome.seconds), seconds + outcome.seconds
        if outcome.kind in BAD and len(told) < MOST_TOLD:
            told.append({"index": index, "kind": outcome.kind, "error": outcome.error})
    peak = max(0, _status("VmHWM") - before)
    return {"counts": dict(counts), "bad": told, "slowest": slowest, "seconds": seconds, "peak_mib": round(peak / 1024, 1)}


def _warm_up(target: Target, folder: Path) -> None:
    """Load what the reader needs, by having it read a valid input; one that refuses that is no test of anything."""
    files = target.valid()
    write(folder, files)
    outcome: Outcome = outcome_of(target, folder)
    remove(folder, files)
    if outcome.kind != "read":
        raise SystemExit(f"{target.name}: does not read its valid input: {outcome.kind} {outcome.error}")


def _limit(memory: int | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard if memory is None else (_status("VmSize") + (memory << 10)) << 10
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _reset_peak() -> int:
    """Forget the peak of resident memory so far, and return what is resident now, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    """A field of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
