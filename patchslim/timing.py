"""How long things take on this machine: candidates timed in turn, by the clock that is fair to them, on a named processor."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from patchslim.progress import Progress

#: Seconds from any start; only differences count.
Clock = Callable[[], float]
_T = TypeVar("_T")
_POLISH_STEPS = 10


def fair_clock(threads: int | None, *, on_cpu: bool = True) -> Clock:
    """The clock for work on ``threads`` threads (0, None: an unknown number): CPU time for one on the CPU, else wall time.

    An engine's only thread is the calling one. Its CPU time stands still while other processes have the core: they hold up
    long runs more often than short ones, so that no average of wall times is fair to both.
    """
    return time.thread_time if threads == 1 and on_cpu else time.perf_counter


def timed(run: Callable[[], object], clock: Clock) -> Callable[[], float]:
    """Return what calls ``run`` once and gives the seconds that it took by ``clock``."""

    def seconds() -> float:
        start = clock()
        run()
        return clock() - start

    return seconds


def interleaved(
    runs: Sequence[Callable[[], _T]], rounds: int, *, warmup: int = 2, progress: Progress | None = None
) -> list[list[_T]]:
    """Call every one of ``runs`` once a round; return what they gave, a list per round in the order of ``runs``.

    Each round has an order of its own, so that a slow moment of the machine, and what a run leaves in the caches, hit all
    alike: a random order in even rounds, the same backwards in odd ones. ``warmup`` rounds before the first are not returned.
    ``progress`` is told (rounds done, rounds in all), warm-up included.
    """
    shuffle = np.random.default_rng(0)
    order: list[int] = []
    found: list[list[_T]] = []
    for number in range(-warmup, rounds):
        order = order[::-1] if order and number % 2 else [int(index) for index in shuffle.permutation(len(runs))]
        given = {index: runs[index]() for index in order}
        if number >= 0:
            found.append([given[index] for index in range(len(runs))])
        if progress is not None:
            progress(number + warmup + 1, rounds + warmup)
    return found


def level_rounds(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return times (rounds, runs) with each round divided by how slow it was against the median round.

    On a machine that is fast for half of the rounds and slow for the others, medians of raw times would pick either speed, run
    by run. Slowness is a factor per round, found by Tukey's median polish of the logarithms (Exploratory Data Analysis, 1977).
    """
    logs = np.log(times)
    slowness = np.zeros((len(times), 1))
    for _ in range(_POLISH_STEPS):
        typical = np.median(logs - slowness, axis=0, keepdims=True)
        slowness = np.median(logs - typical, axis=1, keepdims=True)
    return np.asarray(np.exp(logs - slowness + np.median(slowness)))


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name as Linux's ``cpuinfo`` gives it, else what Python knows of it: at least its architecture."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "unknown processor"
