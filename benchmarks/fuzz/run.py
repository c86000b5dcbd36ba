"""``python -m benchmarks.fuzz``: mutated files over every reader of files that may come from a stranger, counted by outcome.

    python -m benchmarks.fuzz --inputs 1000000 --seed 0
    python -m benchmarks.fuzz --inputs 40000 --only recipe.json SHA256SUMS
    python -m benchmarks.fuzz --replay results.bad/plan.json-17

Each input is a valid file with faults, drawn from its number and ``--seed`` alone. A reader may read it, or refuse it by an
error that its docstring names. Bad are any other exception, a crash, a hang (more than ``--timeout`` seconds of processor time,
or ten times that by the clock) and a failed allocation (more than ``--memory`` MiB on top of the idle process): the exit code
is 5, and the input is kept beside the output, in OUTPUT.bad. A stopped run leaves the table so far, and the same command goes
on where it was, unless code was changed meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import selectors
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.fuzz.cases import BAD, KINDS, Kind, files_of, outcome_of, targets_of, write
from benchmarks.fuzz.targets import counts
from patchslim.cli import run_command
from patchslim.errors import EXIT_DONE, EXIT_PARITY, InputRejected, UsageError
from patchslim.progress import Reporter
from patchslim.records import atomic_path

_ROOT = Path(__file__).parents[2]
_ROOMS = ("benchmarks/fuzz", "export", "graph_passes", "patchslim", "slimming", "validate")
_MOST_KEPT = 100  # bad inputs that are kept, over all readers
_LOOK = 0.5  # seconds between two looks at what the processes do
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}  # one thread, and no address space held in reserve for more
_LIBRARIES = ("numpy", "onnx", "onnxruntime", "pillow", "protobuf", "pydantic", "safetensors", "timm", "torch")


@dataclasses.dataclass(frozen=True)
class FuzzOptions:
    """Options of ``benchmarks.fuzz``."""

    inputs: int = 1_000_000
    """How many inputs, over all readers."""
    seed: int = 0
    """What they are drawn from."""
    only: tuple[str, ...] = ()
    """These readers alone, by name; the rows of others stay in the table."""
    output: Path = Path("benchmarks/fuzz/results.json")
    """The table as JSON."""
    workers: int = os.cpu_count() or 1
    """Processes that read."""
    timeout: float = 10.0
    """Seconds of processor time that one input may take."""
    memory: int = 1024
    """MiB that one input may take."""
    replay: Path | None = None
    """Read one kept input again, in this process and with the whole traceback, and do nothing else."""
    targets: str = "benchmarks.fuzz.targets"
    """The module that lists the readers."""


@dataclasses.dataclass(frozen=True)
class _Chunk:
    target: str
    start: int
    stop: int


class _Worker:
    """A process that reads, and what it is doing."""

    def __init__(self, options: FuzzOptions, folder: Path) -> None:
        self.folder, self.seed = folder, options.seed
        self.chunk: _Chunk | None = None
        (folder / "case").mkdir(parents=True)
        (folder / "number").write_bytes(struct.pack("<q", -1))
        self.log = (folder / "log").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fuzz.worker", options.targets, str(folder), str(options.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.at, self.since = -1, (0.0, 0.0)

    def give(self, chunk: _Chunk) -> None:
        self.chunk, self.at = chunk, -1
        self.since = self.processor_seconds(), time.monotonic()
        with (self.folder / "number").open("r+b") as file:
            file.write(struct.pack("<q", -1))
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its stdout says too
            self.process.stdin.write(json.dumps({"seed": self.seed, **dataclasses.asdict(chunk)}) + "\n")
            self.process.stdin.flush()

    def number(self) -> int:
        """The input that is being read; -1 before the first."""
        return int(struct.unpack("<q", (self.folder / "number").read_bytes())[0])

    def hangs(self, timeout: float) -> bool:
        """Whether one input has taken more than ``timeout`` seconds, or two minutes went by before the first."""
        number, now = self.number(), (self.processor_seconds(), time.monotonic())
        if number != self.at:
            self.at, self.since = number, now
        allowed = timeout if number >= 0 else max(timeout, 120.0)
        return now[0] - self.since[0] > allowed or now[1] - self.since[1] > 10 * allowed

    def processor_seconds(self) -> float:
        """User and system time of the process so far; 0 where it has ended."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> int:
        """Kill the process, and return what it ended with."""
        self.process.kill()
        code = self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return code


def fuzz(options: FuzzOptions, reporter: Reporter) -> dict[str, Any]:
    """Run what is not done yet, and return the table. Raises ``UsageError``; see the module."""
    if options.inputs < 1 or options.workers < 1 or options.timeout <= 0 or options.memory < 1:
        raise UsageError("--inputs, --workers, --timeout and --memory must be positive")
    targets = targets_of(options.targets)
    if unknown := [name for name in options.only if name not in targets]:
        raise UsageError(f"--only {unknown[0]}: not one of {', '.join(targets)}")
    wanted = counts(tuple(targets[name] for name in options.only or targets), options.inputs)
    kept, journal = (options.output.with_suffix(suffix) for suffix in (".bad", ".part"))
    started = {
        "inputs": options.inputs,
        "seed": options.seed,
        "only": list(options.only),
        "timeout": options.timeout,
        "memory": options.memory,
        "code": _code(options),
    }
    done = _done(journal, started)
    if not done:
        shutil.rmtree(kept, ignore_errors=True)
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.write_text(json.dumps(started) + "\n")
    rows = {name: _Row() for name in wanted}
    for answer in done:
        rows[answer["target"]].add(answer)
    there = {(answer["target"], index) for answer in done for index in range(answer["start"], answer["stop"])}
    with reporter.bar("fuzzing", "inputs") as update, journal.open("a") as file:
        file.write("\n" if done else "")  # behind a line that was cut off
        try:
            for answer in _answers(options, _chunks(wanted, there)):
                rows[answer["target"]].add(answer)
                file.write(json.dumps(answer) + "\n")
                file.flush()
                for bad in answer["bad"]:
                    _keep(options, kept, answer["target"], bad)
                update(sum(row.inputs for row in rows.values()), sum(wanted.values()))
        finally:  # also of a run that is stopped: its totals say how many inputs it has read
            table = _table(options, rows)
            with atomic_path(options.output) as part:
                part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    journal.unlink()
    return table


@dataclasses.dataclass
class _Row:
    """What became of one reader's inputs."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    slowest: float = 0.0
    seconds: float = 0.0
    peak_mib: float = 0.0
    errors: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def inputs(self) -> int:
        return self.counts.total()

    def add(self, answer: dict[str, Any]) -> None:
        self.counts.update(answer["counts"])
        self.slowest, self.peak_mib = max(self.slowest, answer["slowest"]), max(self.peak_mib, answer["peak_mib"])
        self.seconds += answer["seconds"]
        self.errors.update(re.sub(r"\d+", "N", bad["error"])[:400] for bad in answer["bad"])


def _chunks(wanted: dict[str, int], there: set[tuple[str, int]]) -> deque[_Chunk]:
    """Runs of inputs that are still to be read, all readers advancing together."""
    found: list[tuple[float, _Chunk]] = []
    for name, count in wanted.items():
        size = min(max(count // 40, 10), 5000)
        for start in range(0, count, size):
            stop = min(start + size, count)
            left = [index for index in range(start, stop) if (name, index) not in there]
            if left:  # a chunk is done in whole, or up to an input that ended the process
                found.append((start / count, _Chunk(name, left[0], stop)))
    return deque(chunk for _, chunk in sorted(found, key=lambda each: each[0]))


def _answers(options: FuzzOptions, waiting: deque[_Chunk]) -> Iterator[dict[str, Any]]:
    """What the processes answer, with one answer made up for each input that ended its process."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # in memory: a million small files
    number = 0
    with tempfile.TemporaryDirectory(prefix="patchslim-fuzz-", dir=place) as work, selectors.DefaultSelector() as selector:
        workers: list[_Worker] = []

        def start(chunk: _Chunk) -> None:
            nonlocal number
            number += 1
            worker = _Worker(options, Path(work) / str(number))
            workers.append(worker)
            assert worker.process.stdout is not None
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            worker.give(chunk)

        def ended(worker: _Worker, kind: Kind) -> Iterator[dict[str, Any]]:
            chunk, at = worker.chunk, worker.number()
            selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
            workers.remove(worker)
            worker.log.seek(0)
            said = worker.log.read()[-2000:].decode("utf-8", "replace").strip()
            code = worker.end()
            if chunk is None:
                return
            if at < chunk.start:
                raise InputRejected(f"the process that reads {chunk.target} ended with {code} before its first input:\n{said}")
            if at > chunk.start:
                waiting.appendleft(_Chunk(chunk.target, chunk.start, at))
            if at + 1 < chunk.stop:
                waiting.appendleft(_Chunk(chunk.target, at + 1, chunk.stop))
            error = f"exit code {code}: {said[-600:]}" if kind == "crash" else f"no end after {options.timeout} s"
            yield {
                "target": chunk.target, "start": at, "stop": at + 1, "counts": {kind: 1}, "slowest": 0.0, "seconds": 0.0,
                "peak_mib": 0.0, "bad": [{"index": at, "kind": kind, "error": error}],
            }  # fmt: skip

        try:
            while waiting or any(worker.chunk for worker in workers):
                while waiting and len(workers) < options.workers:
                    start(waiting.popleft())
                for key, _ in selector.select(_LOOK):
                    worker = key.data
                    line = worker.process.stdout.readline()
                    if not line:
                        yield from ended(worker, "crash")
                        continue
                    chunk, worker.chunk = worker.chunk, None
                    yield {**dataclasses.asdict(chunk), **json.loads(line)}
                    if waiting:
                        worker.give(waiting.popleft())
                for worker in [worker for worker in workers if worker.chunk and worker.hangs(options.timeout)]:
                    yield from ended(worker, "hang")
                for worker in workers:
                    if worker.chunk is None and waiting:
                        worker.give(waiting.popleft())
        finally:
            for worker in workers:
                worker.end()


def _done(journal: Path, started: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers that an earlier run of the same command and code has left; a line that was cut off is none."""
    try:
        first, *lines = journal.read_text().splitlines()
        if json.loads(first) != started:
            return []
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _code(options: FuzzOptions) -> str:
    """Stands for all code whose change makes earlier answers worthless."""
    hasher = hashlib.sha256(options.targets.encode())
    for path in sorted(path for room in _ROOMS for path in (_ROOT / room).rglob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def _keep(options: FuzzOptions, kept: Path, target: str, bad: dict[str, Any]) -> None:
    """Write a bad input's files, and what it is made from, to a folder of its own."""
    if kept.is_dir() and len(list(kept.iterdir())) >= _MOST_KEPT:
        return
    folder = kept / f"{re.sub(r'[^A-Za-z0-9._]+', '-', target)}-{bad['index']}"
    write(folder / "files", files_of(targets_of(options.targets)[target], options.seed, bad["index"]))
    (folder / "case.json").write_text(
        json.dumps({"targets": options.targets, "target": target, "seed": options.seed, **bad}, indent=1)
    )


def replay(folder: Path) -> int:
    """Read a kept input once more, in this process: 0 where it is read or refused now. Raises what its reader raises."""
    try:
        case = json.loads((folder / "case.json").read_text())
        target = targets_of(case["targets"])[case["target"]]
        files = {
            path.relative_to(folder / "files").as_posix(): path.read_bytes()
            for path in (folder / "files").rglob("*")
            if path.is_file()
        }
    except (OSError, ValueError, KeyError) as error:
        raise InputRejected(f"{folder}: not a kept input: {error}") from error
    with tempfile.TemporaryDirectory() as copy:
        write(Path(copy), files)
        outcome = outcome_of(target, Path(copy))
        print(f"{target.name}: input {case['index']} of seed {case['seed']}: {outcome.kind} {outcome.error}")
        if outcome.kind in BAD:
            target.read(Path(copy))
    return EXIT_PARITY if outcome.kind in BAD else EXIT_DONE


def _table(options: FuzzOptions, rows: dict[str, _Row]) -> dict[str, Any]:
    from importlib.metadata import version

    command = " ".join(["python -m benchmarks.fuzz", f"--inputs {options.inputs}", f"--seed {options.seed}"])
    named = {"command": shlex.join([*command.split(), "--only", *options.only])} if options.only else {}
    found = {
        name: {
            "reader": name,
            "inputs": row.inputs,
            **{kind: row.counts[kind] for kind in KINDS},
            "slowest_ms": round(1000 * row.slowest, 1),
            "peak_mib": row.peak_mib,
            "seconds": round(row.seconds, 1),
            **({"errors": dict(row.errors.most_common(10))} if row.errors else {}),
            **named,
        }
        for name, row in rows.items()
    }
    earlier = _earlier(options) if options.only else {}
    readers = [*({row["reader"]: row for row in earlier.get("readers", ())} | found).values()]
    return {
        "command": earlier.get("command", command),
        "timeout_s": options.timeout,
        "memory_mib": options.memory,
        "python": sys.version.split()[0],
        "libraries": {name: version(name) for name in _LIBRARIES},
        "total": {key: sum(reader[key] for reader in readers) for key in ("inputs", *KINDS)},
        "readers": readers,
    }


def _earlier(options: FuzzOptions) -> dict[str, Any]:
    """The table that is there; empty where there is none."""
    try:
        found: dict[str, Any] = json.loads(options.output.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _shown(table: dict[str, Any]) -> Iterator[str]:
    head = ("reader", "inputs", *KINDS, "slowest ms", "peak MiB")
    yield "{:<34}{:>10}{:>9}{:>9}{:>14}{:>7}{:>6}{:>8}{:>12}{:>10}".format(*head)
    for row in [*table["readers"], {"reader": "all", **table["total"], "slowest_ms": "", "peak_mib": ""}]:
        cells = (row["reader"], *(f"{row[key]:,}" for key in ("inputs", *KINDS)), row["slowest_ms"], row["peak_mib"])
        yield "{:<34}{:>10}{:>9}{:>9}{:>14}{:>7}{:>6}{:>8}{:>12}{:>10}".format(*cells)
    for row in table["readers"]:
        for error, count in row.get("errors", {}).items():
            yield f"{row['reader']}: {count} x {error}"


def run(options: FuzzOptions) -> int:
    """The command: replay, or fuzz and print the table; 5 where an outcome was bad."""
    if options.replay is not None:
        return replay(options.replay)
    table = fuzz(options, Reporter())
    print("\n".join(_shown(table)))
    return EXIT_PARITY if any(table["total"][kind] for kind in BAD) else EXIT_DONE


def main() -> int:
    """Run the command line."""
    return run_command(FuzzOptions, run, prog="python -m benchmarks.fuzz", description=(__doc__ or "").split("\n\n")[0])
