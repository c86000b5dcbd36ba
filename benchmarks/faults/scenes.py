"""The scenes: what is done to the commands, and the row of counts that each of them gives."""

from __future__ import annotations

import dataclasses
import random
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.processes import GRACE, Door, Ended, Running
from benchmarks.faults.things import SmallDisk, Thing, bundle_state, largest_file, size_of
from patchslim.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USAGE

DOORS = ("export", "slim", "cut", "validate")
#: The columns that must be 0.
BAD = ("missing", "half", "traceback", "wrong_code", "leftovers", "hung")
#: Shares of what a run writes that fit on the full disk.
DISK_SHARES = (0.0, 0.02, 0.1, 0.25, 0.5, 0.7, 0.85, 0.95)


class UnhurtError(RuntimeError):
    """A command failed where nothing was done to it."""

    def __init__(self, door: Door, ended: Ended) -> None:
        super().__init__(f"{door.module} fails unhurt: exit {ended.code}: {ended.said[-1500:]}")


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
    seconds: float = 0.0

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

    def note_leftovers(self, left: Collection[str], ended: Ended) -> None:
        """Count what a run left behind."""
        self.leftovers += len(left)
        if left and len(self.examples) < 3:
            self.examples.append(f"left {', '.join(sorted(left)[:5])}: exit {ended.code}: {ended.said[-600:]}")

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
        door = thing.door(0, cold=cold)
        running = Running(door, self.log, fresh=fresh)
        running.await_ready()
        began = time.monotonic()
        ended = running.wait()
        if ended.code != EXIT_DONE:
            raise UnhurtError(door, ended)
        return time.monotonic() - began

    def hurt(self, row: Row, name: str, number: int, runs: int, *, fresh: bool = False) -> None:
        """Send ``runs`` runs of a door a signal each, at random moments."""
        thing = self.thing(name, f"{number}-{fresh}")
        lengths = {cold: self.length(thing, cold=cold, fresh=fresh) for cold in (False, True)}
        codes = (EXIT_DONE, -signal.SIGKILL if number == signal.SIGKILL else EXIT_INTERRUPTED)
        known: set[str] = set()
        for run in range(1, runs + 1):
            cold = run % 3 == 0
            running = Running(thing.door(run, cold=cold), self.log, fresh=fresh)
            running.await_ready()
            running.hurt(number, self.draws.uniform(0, 1.1 * lengths[cold]))
            ended = running.wait(GRACE)
            row.count(ended, codes, thing.state())
            if number != signal.SIGKILL:  # one that may tidy up must
                left, known = set(thing.leftovers()) - known, set(thing.leftovers())
                row.note_leftovers(left, ended)
        self._after(thing, row)

    def race(self, row: Row, writers: int, rounds: int) -> None:
        """Publish by several processes at once to one folder, and read it all the while."""
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

    def fill(self, row: Row, name: str, shares: Sequence[float], *, mounts: bool) -> None:
        """Run a door on a disk on which only a share of what it writes fits, over what an earlier run made.

        Where ``mounts`` is false, no file may be larger than that share of the largest one that it makes.
        """
        plain = self.thing(name, "size")
        before = size_of(plain.folder)
        self._good(plain.door(1, cold=True))
        # What is made lies beside the earlier one until it takes its place.
        need = size_of(plain.folder) - before + size_of(plain.path)
        for number, share in enumerate(shares):
            folder = self.folder / f"disk-{name}-{number}"
            with SmallDisk(folder, mounts=mounts) as disk:
                thing = self.thing(name, "", folder)
                disk.leave(int(share * need))
                limit = None if mounts else max(4096, int(share * largest_file(plain.path)))
                running = Running(thing.door(1, cold=True), self.log, max_file_bytes=limit)
                ended = running.wait()
                row.count(ended, (EXIT_DONE, EXIT_USAGE), thing.state())
                row.note_leftovers(thing.leftovers(), ended)

    def _after(self, thing: Thing, row: Row) -> None:
        """A good run must go through after all that, and leave nothing of the others behind."""
        ended = Running(thing.door(0), self.log).wait()
        row.count(ended, (EXIT_DONE,), thing.state())
        row.note_leftovers(thing.leftovers(), ended)

    def _good(self, door: Door) -> None:
        ended = Running(door, self.log).wait()
        if ended.code != EXIT_DONE:
            raise UnhurtError(door, ended)


@dataclass(frozen=True)
class Scene:
    """One kind of fault to one door, by the name of its row."""

    what: str
    play: Callable[[Workshop, Row], None]

    def row(self, shop: Workshop) -> Row:
        """Play it. A command that fails before anything was done to it is counted too, and ends the scene."""
        row, began = Row(self.what), time.monotonic()
        try:
            self.play(shop, row)
        except UnhurtError as failure:
            row.wrong_code += 1
            row.examples.append(str(failure))
        row.seconds = round(time.monotonic() - began, 1)
        return row


def scenes(*, short: bool, doors: Sequence[str], mounts: bool) -> Iterator[Scene]:
    """Every kind of fault to ``doors``, in order. ``mounts``: whether this user may mount a small disk."""
    for name in doors:
        kills = (6 if name == "export" else 3) if short else (200 if name == "export" else 100)
        yield _hurting(name, signal.SIGKILL, kills, fresh=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        for name in doors:
            forked, fresh = (2, 1) if short else (90, 10)
            yield _hurting(name, number, forked, fresh=False)
            yield _hurting(name, number, fresh, fresh=True)
    for writers in (2, 4) if "export" in doors else ():
        yield _racing(writers, 1 if short else 25)
    for name in doors:
        if name != "validate":  # which writes nothing
            yield _filling(name, DISK_SHARES[::4] if short else DISK_SHARES, mounts=mounts)


def _hurting(name: str, number: signal.Signals, runs: int, *, fresh: bool) -> Scene:
    what = f"{name}: {number.name}{', fresh process' if fresh else ''}"
    return Scene(what, lambda shop, row: shop.hurt(row, name, number, runs, fresh=fresh))


def _racing(writers: int, rounds: int) -> Scene:
    return Scene(f"export: {writers} writers and a reader", lambda shop, row: shop.race(row, writers, rounds))


def _filling(name: str, shares: Sequence[float], *, mounts: bool) -> Scene:
    what = f"{name}: {'full disk' if mounts else 'files limited in size'}"
    return Scene(what, lambda shop, row: shop.fill(row, name, shares, mounts=mounts))
