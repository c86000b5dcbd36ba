"""``python -m benchmarks.faults``: hurt every command at random moments, and count what must never be.

    python -m benchmarks.faults --output benchmarks/faults/results.json

The models are tiny and random, so that a run takes seconds; each writes over what an earlier one made. Moments are drawn
evenly over a run's length, from when the command handles signals (before that there is nothing of ours to be wrong). Two of
three runs find their stages in the work folder, so that many moments fall near the publication. Commands are forked from a
process that has loaded PyTorch, so that few moments fall into its loading; "fresh process" rows are for those. A full disk is a
tmpfs on which only a share of what a run writes is left, or, where this user may mount none, a limit on the size of a file
(RLIMIT_FSIZE): the row is named after it. The rows are written as they are found: a run that was stopped goes on with the next
one, if the code is the same, and so do runs of some doors each (``--only``) into one file.

``--short`` is the same with a few of each: ``pytest -m slow tests/benchmarks/test_faults.py`` runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.processes import preload
from benchmarks.faults.scenes import BAD, DOORS, Row, Workshop, scenes
from benchmarks.faults.things import SmallDisk
from export.cache import code_digest
from patchslim.cli import run_command
from patchslim.errors import EXIT_DONE, EXIT_PARITY, UsageError
from patchslim.records import atomic_path


@dataclass(frozen=True)
class FaultOptions:
    """Kill, interrupt, race and starve every command, and count what must never be."""

    short: bool = False
    """A few of each, in a minute or two for each door."""
    only: tuple[str, ...] = ()
    """These doors only, of export, slim, cut and validate."""
    output: Path | None = None
    """Also write the rows here, as JSON, each as soon as it is found."""
    seed: int = 0
    """Draws the moments."""
    json: bool = False
    """Print one JSON object on stdout instead of a table."""


def run(options: FaultOptions) -> int:
    """Run every scene and print the table; 5 where a column that must be 0 is not."""
    doors = options.only or DOORS
    if unknown := [name for name in doors if name not in DOORS]:
        raise UsageError(f"--only {unknown[0]}: not one of {', '.join(DOORS)}")
    preload()
    table = FaultTable(options)
    with tempfile.TemporaryDirectory(prefix="patchslim-faults-") as folder:
        mounts = SmallDisk.may_mount(Path(folder) / "trial")
        every = [scene.what for scene in scenes(short=options.short, doors=DOORS, mounts=mounts)]
        shop: Workshop | None = None
        for scene in scenes(short=options.short, doors=doors, mounts=mounts):
            if not table.has(scene.what):
                # Moments of their own for each scene: they are the same whether the ones before were run now or earlier.
                draws = random.Random(f"{options.seed} {scene.what}")
                shop = shop or Workshop(Path(folder), draws)
                shop.draws = draws
                row = scene.row(shop)
                table.add(row, every)
                print(f"{row.what}: {row.bad} bad, {row.seconds:.0f} s", file=sys.stderr)
    if options.json:
        print(table.text())
    else:
        print_table(table.rows)
    return EXIT_PARITY if any(row.bad for row in table.rows) else EXIT_DONE


class FaultTable:
    """The rows so far, in memory and in the file that the options name."""

    def __init__(self, options: FaultOptions) -> None:
        self.output = options.output
        words = ["--short"] * options.short + [f"--seed {options.seed}"] * (options.seed != 0)
        self.head: dict[str, Any] = {
            "command": " ".join(["python -m benchmarks.faults", *words]),
            "short": options.short,
            "seed": options.seed,
            "code": code_digest(),
            "python": platform.python_version(),
        }
        self.complete = False
        self.rows = self._earlier()

    def _earlier(self) -> list[Row]:
        """The rows of a stopped run of the same command and code."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self.output.read_text(encoding="utf-8")) if self.output is not None else {}
            if found and not found["complete"] and {name: found[name] for name in self.head} == self.head:
                return [Row(**row) for row in found["rows"]]
        return []

    def has(self, what: str) -> bool:
        """Whether the row of that name is there."""
        return any(row.what == what for row in self.rows)

    def add(self, row: Row, every: Sequence[str]) -> None:
        """One more row; ``every`` are the names of all that make the table complete, in order."""
        self.rows.append(row)
        self.complete = set(every) <= {row.what for row in self.rows}
        self.rows.sort(key=lambda row: every.index(row.what))
        if self.output is not None:
            with atomic_path(self.output) as part:
                part.write_text(self.text() + "\n", encoding="utf-8")

    def text(self) -> str:
        """The table as JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        total = {name: sum(row[name] for row in rows) for name in ("runs", "finished", *BAD)}
        return json.dumps({**self.head, "complete": self.complete, "total": total, "rows": rows}, indent=1)


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
