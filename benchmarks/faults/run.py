"""``python -m benchmarks.faults``: hurt every command at random moments, and count what must never be.

The models are tiny and random, so that a run takes seconds; each writes over what an earlier one made. Moments are drawn evenly
over a run's length, from when the command handles signals (before that there is nothing of ours to be wrong). Half of the runs
find their stages in the work folder, so that half of the moments fall near the publication. A full disk is a tmpfs of the size
said, or, where this user may mount none, a limit on the size of a file (RLIMIT_FSIZE): the row is named after it.

``--short`` is the same with a few of each: ``pytest -m slow tests/benchmarks/test_faults.py`` runs it.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.processes import GRACE, Door, Ended, Running, preload
from benchmarks.faults.things import SmallDisk, Thing, bundle_state
from patchslim.cli import run_command
from patchslim.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PARITY, EXIT_USAGE, UsageError

DOORS = ("export", "slim", "cut", "validate")
#: The columns that must be 0.
BAD = ("missing", "half", "traceback", "wrong_code", "leftovers", "hung")
#: Shares of what a run writes that fit on the full disk.
DISK_SHARES = (0.0, 0.02, 0.1, 0.25, 0.5, 0.7, 0.85, 0.95)


@dataclass(frozen=True)
class FaultOptions:
    """Kill, interrupt, race and starve every command, and count what must never be."""

    short: bool = False
    """A few of each, in a minute or two."""
    only: tuple[str, ...] = ()
    """These doors only, of export, slim, cut and validate."""
    output: Path | None = None
    """Also write the rows here, as JSON."""
    seed: int = 0
    """Draws the moments."""
    json: bool = False
    """Print one JSON object on stdout instead of a table."""


@dataclass
class Row:
    """What became of the runs of one kind; the fields from ``missing`` on must be 0."""

    what: str
    runs: int = 0
    finished: int = 0  # had ended before the moment came
    missing: int = 0  # nothing was there
    half: int = 0  # something was there, and not whole
    traceback: int = 0
    wrong_code: int = 0
    leftovers: int = 0  # files left after a good run that followed
    hung: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def count(self, ended: Ended, codes: tuple[int, ...], state: str) -> None:
        """Count one run that should have ended with one of ``codes``."""
        self.runs += 1
        self.finished += ended.code == EXIT_DONE
        bad = {
            "missing": state == "missing",
            "half": state == "half",
            "traceback": ended.traceback,
            "wrong_code": ended.code not in codes and not ended.hung,
            "hung": ended.hung,
        }
        for name, found in bad.items():
            setattr(self, name, getattr(self, name) + found)
        if any(bad.values()) and len(self.examples) < 3:
            self.examples.append(f"{', '.join(name for name in bad if bad[name])}: exit {ended.code}: {ended.said[-1500:]}")

    @property
    def bad(self) -> int:
        """How much there is that must not be."""
        return sum(getattr(self, name) for name in BAD)


class Workshop:
    """Where the commands run: a throw-away folder with what they are given, and a place for each thing that they make."""

    def __init__(self, folder: Path, draws: random.Random) -> None:
        self.folder, self.draws, self.log = folder, draws, folder / "log"
        given = Thing("export", folder / "given", folder / "given" / "bundle")
        given.folder.mkdir()
        self._good(given.door(0))
        shutil.copy(given.path / "plan.json", folder / "given" / "plan.json")
        (dense,) = (given.folder / "work").glob("dense-*/*.onnx")
        shutil.copy(dense, folder / "given" / "dense.onnx")
        self._given = given.path

    def thing(self, name: str, label: str, folder: Path | None = None) -> Thing:
        """A thing that was made once already, whole."""
        folder = folder or self.folder / f"{name}-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / {"export": "bundle", "slim": "plan.json", "cut": "slim.onnx", "validate": "bundle"}[name]
        thing = Thing(name, folder, path)
        if name == "validate":
            shutil.copytree(self._given, path)
        else:
            self._good(thing.door(0))
        return thing

    def length(self, thing: Thing, *, cold: bool, fresh: bool) -> float:
        """Seconds that a run takes from when it handles signals."""
        running = Running(thing.door(7, cold=cold), self.log, fresh=fresh)
        running.await_ready()
        began = time.monotonic()
        ended = running.wait()
        if ended.code != EXIT_DONE:
            raise RuntimeError(f"{thing.name} fails unhurt: exit {ended.code}: {ended.said}")
        return time.monotonic() - began

    def hurt(self, name: str, number: int, runs: int, *, fresh: bool = False) -> Row:
        """Send ``runs`` runs of a door a signal each, at random moments."""
        word = signal.Signals(number).name
        row = Row(f"{name}: {word}{', fresh process' if fresh else ''}")
        thing = self.thing(name, f"{word}-{fresh}")
        lengths = {cold: self.length(thing, cold=cold, fresh=fresh) for cold in (False, True)}
        codes = (EXIT_DONE, -signal.SIGKILL if number == signal.SIGKILL else EXIT_INTERRUPTED)
        for run in range(1, runs + 1):
            cold = bool(run // 2 % 2)
            running = Running(thing.door(run, cold=cold), self.log, fresh=fresh)
            running.await_ready()
            running.hurt(number, self.draws.uniform(0, 1.1 * lengths[cold]))
            row.count(running.wait(GRACE), codes, thing.state())
            if number != signal.SIGKILL:  # one that may tidy up must
                row.leftovers += len(thing.leftovers())
        self._after(thing, row)
        return row

    def race(self, writers: int, rounds: int) -> Row:
        """Publish by several processes at once to one folder, and read it all the while."""
        row = Row(f"export: {writers} writers and a reader")
        thing = self.thing("export", f"race-{writers}")
        self._good(thing.door(1))
        for _ in range(rounds):
            logs = [self.folder / f"log-{writer}" for writer in range(writers)]
            running = [Running(thing.door(writer), log) for writer, log in enumerate(logs)]
            ends: list[Ended] = []
            while running:
                state = bundle_state(thing.path)
                row.missing += state == "missing"
                row.half += state == "half"
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    ends.append(one.wait())
            for ended in ends:
                row.count(ended, (EXIT_DONE, EXIT_USAGE), thing.state())
        self._after(thing, row)
        return row

    def fill(self, name: str, shares: tuple[float, ...]) -> Row:
        """Run a door on a disk on which only a share of what it writes fits, over what an earlier run made."""
        plain = self.thing(name, "size")
        before = _size(plain.folder)
        self._good(plain.door(1))
        need = max(_size(plain.folder) - before, plain_size(plain.path))
        row = Row(f"{name}: full disk")
        for number, share in enumerate(shares):
            disk = SmallDisk(self.folder / f"disk-{name}-{number}", before + (1 << 16) + int(share * need))
            try:
                limit = None
                if not disk.mounted:
                    limit = max(4096, int(share * plain_size(plain.path)))
                    row.what = f"{name}: files limited in size"
                thing = self.thing(name, "", disk.folder)
                running = Running(thing.door(1, cold=True), self.log, max_file_bytes=limit)
                row.count(running.wait(), (EXIT_DONE, EXIT_USAGE), thing.state())
                row.leftovers += len(thing.leftovers())
            finally:
                disk.close()
        return row

    def _after(self, thing: Thing, row: Row) -> None:
        """A good run must go through after all that, and leave nothing of the others behind."""
        ended = Running(thing.door(0), self.log).wait()
        row.count(ended, (EXIT_DONE,), thing.state())
        left = thing.leftovers()
        row.leftovers += len(left)
        row.examples += [f"left behind: {', '.join(left[:5])}"] if left else []

    def _good(self, door: Door) -> None:
        ended = Running(door, self.log).wait()
        if ended.code != EXIT_DONE:
            raise RuntimeError(f"{door.module} fails unhurt: exit {ended.code}: {ended.said}")


def plain_size(path: Path) -> int:
    """Bytes of a file or a folder, and of what lies beside it under the same stem."""
    return _size(path) if path.is_dir() else sum(one.stat().st_size for one in path.parent.glob(f"{path.stem}.*"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def scenes(shop: Workshop, *, short: bool, doors: Sequence[str]) -> Iterator[Callable[[], Row]]:
    """Every kind of fault to ``doors``, in order."""
    for name in doors:
        kills = (6 if name == "export" else 3) if short else (200 if name == "export" else 100)
        yield lambda name=name, kills=kills: shop.hurt(name, signal.SIGKILL, kills)  # type: ignore[misc]
    for number in (signal.SIGINT, signal.SIGTERM):
        for name in doors:
            forked, fresh = (2, 1) if short else (75, 25)
            yield lambda name=name, number=number, runs=forked: shop.hurt(name, number, runs)  # type: ignore[misc]
            yield lambda name=name, number=number, runs=fresh: shop.hurt(name, number, runs, fresh=True)  # type: ignore[misc]
    for writers in (2, 4) if "export" in doors else ():
        yield lambda writers=writers: shop.race(writers, 1 if short else 25)  # type: ignore[misc]
    for name in doors:
        if name == "validate":  # writes nothing
            continue
        yield lambda name=name: shop.fill(name, DISK_SHARES[::4] if short else DISK_SHARES)  # type: ignore[misc]


def run(options: FaultOptions) -> int:
    """Run every scene and print the table; 5 where a column that must be 0 is not."""
    doors = options.only or DOORS
    if unknown := [name for name in doors if name not in DOORS]:
        raise UsageError(f"--only {unknown[0]}: not one of {', '.join(DOORS)}")
    preload()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="patchslim-faults-") as folder:
        shop = Workshop(Path(folder), random.Random(options.seed))
        for scene in scenes(shop, short=options.short, doors=doors):
            began = time.monotonic()
            rows.append(scene())
            print(f"{rows[-1].what}: {rows[-1].bad} bad, {time.monotonic() - began:.0f} s", file=sys.stderr)
    found = {"command": "python -m benchmarks.faults", "short": options.short, "seed": options.seed}
    text = json.dumps({**found, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        print_table(rows)
    return EXIT_PARITY if any(row.bad for row in rows) else EXIT_DONE


def print_table(rows: list[Row]) -> None:
    """One row for each kind of fault."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "runs", "finished", *(name.replace("_", " ") for name in BAD))
    for row in rows:
        table.add_row(row.what, str(row.runs), str(row.finished), *(str(getattr(row, name)) for name in BAD))
    console = Console(width=120, highlight=False)
    console.print(table)
    for row in rows:
        for example in row.examples:
            console.print(f"{row.what}: {example}", markup=False)


def main() -> int:
    """The command line's entry point; returns the exit code."""
    return run_command(FaultOptions, run, prog="python -m benchmarks.faults", description=__doc__ or "")
