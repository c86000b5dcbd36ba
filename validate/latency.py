"""How much faster the slim graph is than the dense one in ONNX Runtime, measured so that slow moments of the machine cancel."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from patchslim.errors import InputRejected
from patchslim.ort_runner import CPU
from patchslim.records import StrictRecord
from patchslim.timing import interleaved
from validate.isolated import IsolatedRunner, Limits

#: The speed-up must be at least this fraction of the MAC ratio.
CRITERION = 0.95
_FEWEST_ROUNDS = 5


class LatencyReport(StrictRecord):
    """Dense against slim, side by side. ``rounds`` pairs of runs were timed, in alternating order.

    Times are of one whole batch: CPU time with one thread on the CPU, else wall time.
    """

    dense: str
    slim: str
    provider: str
    batch: int
    threads: int
    rounds: int
    dense_ms: Annotated[float, Field(gt=0)] = Field(description="median time of a batch, milliseconds")
    slim_ms: Annotated[float, Field(gt=0)] = Field(description="median time of a batch, milliseconds")
    speedup: float = Field(description="median over the rounds of dense time / slim time")
    speedup_p10: float = Field(description="10th percentile of those ratios")
    speedup_p90: float = Field(description="90th percentile of those ratios")
    macs_ratio: float | None = Field(description="dense MACs / slim MACs, as laid")
    efficiency: float | None = Field(description="speedup / macs_ratio: the share of the saved work that is saved time")
    meets_criterion: bool | None = Field(description=f"efficiency is at least {CRITERION}")


def compare_latency(
    dense: Path,
    slim: Path,
    macs_ratio: float | None = None,
    *,
    batch: int = 8,
    threads: int = 1,
    rounds: int = 30,
    warmup: int = 3,
    provider: str = CPU,
    limits: Limits | None = None,
    seconds: float | None = None,
) -> LatencyReport:
    """Time both ONNX files on the same random batch, a pair of runs per round, the order swapped every other round.

    The ratio is taken within each round, so a slow moment hits both sides, and the median over rounds drops the outliers;
    neither model's threads spin while the other runs. ``threads`` 0 leaves their number to ONNX Runtime. Each model has a
    process of its own, which counts its own time, within ``limits``. With ``seconds`` as many rounds are timed as about fit
    into that, by a first one that is not counted: at least 5, at most ``rounds``. Raises ``InputRejected`` for files that do
    not run, take different images or more than the limits, ``Unavailable`` where ONNX Runtime or ``provider`` is not here.
    """
    with contextlib.ExitStack() as stack:
        runners = [
            stack.enter_context(
                IsolatedRunner(path.parent, None, path.name, limits or Limits(), provider=provider, threads=threads)
            )
            for path in (dense, slim)
        ]
        shapes = [runner.inputs[0].shape[1:] for runner in runners]
        if shapes[0] != shapes[1]:
            raise InputRejected(f"{slim}: takes images {shapes[1]}, and {dense} takes {shapes[0]}")
        runs = [runner.timed(batch) for runner in runners]
        if seconds is not None:
            (once,) = interleaved(runs, 1, warmup=warmup)
            rounds, warmup = max(_FEWEST_ROUNDS, min(rounds, round(seconds / sum(once)))), 0
        times: NDArray[np.float64] = np.array(interleaved(runs, rounds, warmup=warmup))
    ratios = times[:, 0] / times[:, 1]
    low, speedup, high = (float(value) for value in np.percentile(ratios, [10, 50, 90]))
    efficiency = None if macs_ratio is None else speedup / macs_ratio
    return LatencyReport(
        dense=dense.name,
        slim=slim.name,
        provider=provider,
        batch=batch,
        threads=threads,
        rounds=rounds,
        dense_ms=float(np.median(times[:, 0])) * 1e3,
        slim_ms=float(np.median(times[:, 1])) * 1e3,
        speedup=speedup,
        speedup_p10=low,
        speedup_p90=high,
        macs_ratio=macs_ratio,
        efficiency=efficiency,
        meets_criterion=None if efficiency is None else efficiency >= CRITERION,
    )
