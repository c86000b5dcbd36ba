"""Progress bars on stderr for long stages: done, rate and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from patchslim.interrupts import raise_if_interrupted

_UNITS = {"top-down search": "blocks", "compensating": "blocks", "fitting": "steps", "fine-tuning": "steps"}
#: Called as work goes on: (done, total).
Progress = Callable[[int, int], None]
#: Called as work of several stages goes on: (stage, done, total).
StageProgress = Callable[[str, int, int], None]


class Reporter:
    """Says on stderr what is being done; stdout stays free for results. A ``quiet`` one says nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        from patchslim.console import Console

        self.console = Console(stderr=True, highlight=False, quiet=quiet)

    def say(self, text: str) -> None:
        """One line."""
        raise_if_interrupted()
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def bar(self, title: str, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
        """A bar for the block; call ``update(done, total)`` as the work goes on."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=None, rate="")

            def update(done: int, total: int) -> None:
                raise_if_interrupted()
                elapsed = progress.tasks[0].elapsed or 0.0
                rate = f"{done / elapsed:.1f} {unit}/s" if elapsed > 0.2 and unit else ""
                progress.update(task, completed=done, total=total, rate=rate)

            yield update

    @contextlib.contextmanager
    def stages(self, unit: str = "images") -> Iterator[Callable[[str, int, int], None]]:
        """Several bars, one after the other, by the name that the work itself gives: ``update(stage, done, total)``."""
        with contextlib.ExitStack() as stack:
            current: tuple[str, Callable[[int, int], None]] | None = None

            def update(stage: str, done: int, total: int) -> None:
                nonlocal current
                if current is None or current[0] != stage:
                    stack.close()
                    current = (stage, stack.enter_context(self.bar(stage, _UNITS.get(stage, unit))))
                current[1](done, total)

            yield update
