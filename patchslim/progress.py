"""Progress on stderr for long stages: bars on a terminal; elsewhere lines, so that a log never falls silent."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from patchslim.interrupts import raise_if_interrupted

_UNITS = {"searching": "steps", "compensating": "blocks", "fitting": "steps", "fine-tuning": "steps"}
#: Seconds after which a line is written where the output is not a terminal: whoever reads a log waits for 15.
INTERVAL_S = 10.0
#: Called as work goes on: (done, total).
Progress = Callable[[int, int], None]
#: Called as work of several stages goes on: (stage, done, total).
StageProgress = Callable[[str, int, int], None]


class Reporter:
    """Says on stderr what is being done; stdout stays free for results. A ``quiet`` one says nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        from patchslim.console import Console

        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self._doing, self._said = "", time.monotonic()
        self._beating = False

    def say(self, text: str) -> None:
        """One line."""
        raise_if_interrupted()
        self._doing = text
        self._print(text)

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """For the block, where the output is not a terminal: a line every ``INTERVAL_S`` says how far the work is."""
        if self.console.is_terminal or self.console.quiet or self._beating:
            yield
            return
        stop = threading.Event()

        def beat() -> None:
            started = self._said
            while not stop.wait(max(0.01, self._said + INTERVAL_S - time.monotonic())):
                if time.monotonic() - self._said >= INTERVAL_S:
                    self._print(f"{self._doing} ({time.monotonic() - started:.0f} s)")

        thread = threading.Thread(target=beat, daemon=True)
        self._beating, self._said = True, time.monotonic()
        thread.start()
        try:
            yield
        finally:
            self._beating = False
            stop.set()
            thread.join()

    @contextlib.contextmanager
    def bar(self, title: str, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
        """A bar for the block; call ``update(done, total)`` as the work goes on. One that was never called leaves nothing."""
        with self._bar(title, unit) if self.console.is_terminal else self._lines(title, unit) as update:
            yield update

    @contextlib.contextmanager
    def stages(self, unit: str = "images") -> Iterator[Callable[[str, int, int], None]]:
        """Several bars, one after the other, by the name that the work itself gives: ``update(stage, done, total)``."""
        with self.alive(), contextlib.ExitStack() as stack:
            current: tuple[str, Callable[[int, int], None]] | None = None

            def update(stage: str, done: int, total: int) -> None:
                nonlocal current
                if current is None or current[0] != stage:
                    stack.close()
                    current = (stage, stack.enter_context(self.bar(stage, _UNITS.get(stage, unit))))
                current[1](done, total)

            yield update

    @contextlib.contextmanager
    def _bar(self, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
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
                progress.update(task, completed=done, total=total, rate=_rate(done, elapsed, unit))

            try:
                yield update
            finally:
                if progress.tasks[0].total is None:
                    progress.update(task, visible=False)

    @contextlib.contextmanager
    def _lines(self, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        started, last = time.monotonic(), ""

        def update(done: int, total: int) -> None:
            nonlocal last
            raise_if_interrupted()
            rate = _rate(done, time.monotonic() - started, unit)
            self._doing = last = " ".join(filter(None, [title, f"{done}/{total}", rate]))

        with self.alive():
            self._doing = title
            try:
                yield update
            finally:
                if last:
                    self._print(f"{last} in {time.monotonic() - started:.0f} s")

    def _print(self, text: str) -> None:
        self._said = time.monotonic()
        self.console.print(text, markup=False, soft_wrap=True)


def _rate(done: int, elapsed: float, unit: str) -> str:
    return f"{done / elapsed:.1f} {unit}/s" if elapsed > 0.2 and unit else ""
