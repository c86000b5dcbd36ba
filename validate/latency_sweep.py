"""How long a model takes on this machine, batch size by batch size: percentiles after a warm-up, and images per second."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from validate.engine_runs import Clock, LatencyPoint
from validate.isolated import IsolatedRunner

#: Batch sizes of a sweep, as far as a model takes them.
BATCHES = (1, 8, 32)
_WARMUP, _FEWEST, _MOST = 3, 5, 1000  # runs at one batch size
_TOO_LONG = 2.0  # a batch that would take this many times the seconds of a batch size is left out
_TICK = 1e-9  # seconds: a clock may be too coarse for a small model


def sweep(runner: IsolatedRunner, seconds: float, clock: Clock) -> list[LatencyPoint]:
    """Time a batch at each size of ``BATCHES`` that the model takes, for ``seconds`` each, after a warm-up.

    The smallest is always timed; larger ones that would take too long are left out. ``clock`` says by which the runner counts.
    Raises as ``IsolatedRunner.timed`` does.
    """
    fewest, most = runner.batch_limits
    points: list[LatencyPoint] = []
    for batch in sorted({max(fewest, size if most is None else min(size, most)) for size in BATCHES}):
        if points and batch / points[-1].images_per_second > _TOO_LONG * seconds:
            break
        run = runner.timed(batch, wall=True)
        for _ in range(_WARMUP):
            run()
        times: list[float] = []
        end = time.monotonic() + seconds
        while len(times) < _FEWEST or (len(times) < _MOST and time.monotonic() < end):
            times.append(run())
        points.append(point(batch, np.array(times), clock))
    return points


def point(batch: int, times: NDArray[np.float64], clock: Clock) -> LatencyPoint:
    """The times of runs of one batch size, in seconds, as a record; a percentile that so few runs cannot show is None."""
    times = np.maximum(times, _TICK)
    middle, high, highest = (float(value) * 1e3 for value in np.percentile(times, [50, 90, 99]))
    return LatencyPoint(
        batch=batch,
        runs=len(times),
        p50_ms=middle,
        p90_ms=high if len(times) >= 10 else None,
        p99_ms=highest if len(times) >= 100 else None,
        images_per_second=batch * len(times) / float(times.sum()),
        clock=clock,
    )
