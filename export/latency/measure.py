"""Measures the ``LatencyTable`` of a model: one block, as a plan lays it, timed over a grid of token counts on one engine.

The engine is ONNX Runtime, on the execution provider that the export would run it on, or TensorRT on this machine's GPU.
Executed on CPUs only so far: of TensorRT the blocks have been built, not timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.latency.block_extraction import HEAD, STEM, WHOLE, Key, ModelParts, with_batch
from export.latency.conditions import TimingConditions
from export.latency.timed_runs import Run, open_timer
from patchslim.choices import Mode
from patchslim.errors import UsageError
from patchslim.latency_table import LatencyPoint, LatencyTable
from patchslim.plan import SlimPlan
from patchslim.progress import StageProgress
from patchslim.timing import interleaved, level_rounds

#: Fractions of N at which a block is measured unless a grid is given, beside the prefix tokens alone and what the head reads.
FRACTIONS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1)
ROUNDS = 15


def measure_table(
    dense_onnx: Path,
    model_plan: SlimPlan,
    conditions: TimingConditions,
    *,
    grid: Sequence[int] | None = None,
    rounds: int = ROUNDS,
    progress: StageProgress | None = None,
) -> LatencyTable:
    """Time a block of ``dense_onnx`` for every (tokens in, tokens out) of ``grid``, and the dense model and its two ends.

    ``model_plan`` is any plan of the model: its sizes are used, its cuts are not. ``grid`` holds token counts between the
    prefix tokens and N; None: ``FRACTIONS`` of N. Every block is cut by the same passes as a slim model, then taken out of it
    and run alone on random inputs; idle threads do not spin while another block runs. All are timed in turn, in a new order
    each of ``rounds`` rounds; a point is its median in milliseconds, less what made whole rounds slow (``level_rounds``). The
    ends are measured by themselves, not as what full blocks leave of the whole: a difference of large noisy times can even be
    negative. One thread is timed by its CPU time, several by wall time. ``progress`` is called with (stage, done, total).

    Raises ``Unavailable`` where the engine cannot run blocks here, ``InputRejected`` for an ONNX file that is not understood
    or that ``model_plan`` does not fit, ``UsageError`` for an impossible grid, batch, thread count or number of rounds.
    """
    conditions.check()
    if rounds < 1:
        raise UsageError(f"a latency table needs at least 1 for rounds, not {rounds}")
    report = progress or (lambda stage, done, total: None)
    counts = _grid(model_plan, conditions.mode, grid)
    timer = open_timer(dense_onnx, conditions)
    try:
        with tempfile.TemporaryDirectory(prefix="patchslim-") as folder:
            runs: list[Run] = []
            parts = ModelParts(dense_onnx, model_plan, conditions)
            keys: list[Key] = [WHOLE, STEM, HEAD, *counts]
            for done, key in enumerate(keys):
                path = Path(folder) / f"{done}.onnx"
                parts.write(key, path)
                runs.append(timer.open(path))
                path.unlink()
                report("cutting blocks to time", done + 1, len(keys))
            timed = interleaved(runs, rounds, progress=lambda done, total: report("timing blocks", done, total))
    finally:
        timer.close()
    low, middle, high = np.percentile(level_rounds(np.array(timed)), [25, 50, 75], axis=0) * 1e3
    medians = dict(zip(keys, middle.tolist(), strict=True))
    return LatencyTable(
        model=model_plan.model,
        tokens=model_plan.tokens,
        depth=model_plan.depth,
        geometry=model_plan.geometry,
        mode=conditions.mode,
        layout=conditions.layout,
        merged=conditions.merged,
        engine=conditions.engine,
        engine_version=timer.version,
        precision=conditions.precision,
        device=timer.device,
        threads=timer.threads,
        batch=conditions.batch,
        points=[LatencyPoint(tokens_in=n, tokens_out=k, ms=medians[n, k]) for n, k in counts],
        fixed_ms=medians[STEM] + medians[HEAD],
        dense_ms=medians[WHOLE],
        repeats=rounds,
        spread=float(np.median((high - low) / middle)),
    )


@dataclass(frozen=True)
class SideBySide:
    """Median times of a batch of the dense and of the slim model, in milliseconds, measured in turn on ``device``."""

    dense_ms: float
    slim_ms: float
    device: str


def measure_pair(
    dense_onnx: Path,
    slim_onnx: Path,
    model_plan: SlimPlan,
    conditions: TimingConditions,
    *,
    rounds: int = ROUNDS,
    progress: StageProgress | None = None,
) -> SideBySide:
    """Time ``dense_onnx``, through the same passes as in a table, and the finished ``slim_onnx``, in turn.

    Raises as ``measure_table`` does.
    """
    from graph_passes import load_model, save_model

    report = progress or (lambda stage, done, total: None)
    timer = open_timer(dense_onnx, conditions)
    try:
        with tempfile.TemporaryDirectory(prefix="patchslim-") as folder:
            paths = [Path(folder) / "dense.onnx", Path(folder) / "slim.onnx"]
            ModelParts(dense_onnx, model_plan, conditions).write(WHOLE, paths[0])
            save_model(with_batch(load_model(slim_onnx), conditions.batch), paths[1])
            runs = [timer.open(path) for path in paths]
            timed = interleaved(runs, rounds, progress=lambda done, total: report("timing the result", done, total))
    finally:
        timer.close()
    dense_ms, slim_ms = (float(value) for value in np.median(level_rounds(np.array(timed)), axis=0) * 1e3)
    return SideBySide(dense_ms, slim_ms, timer.device)


def _grid(plan: SlimPlan, mode: Mode, grid: Sequence[int] | None) -> list[tuple[int, int]]:
    """(tokens in, tokens out) to measure. Blocks in stale form, and the only block of a model, read every token."""
    tokens, fewest, head = plan.tokens, max(plan.prefix_tokens, 1), len(plan.head_tokens)
    wanted = [round(part * tokens) for part in FRACTIONS] if grid is None else list(grid)
    if grid is not None and not all(fewest <= count <= tokens for count in grid):
        raise UsageError(f"a latency table of {plan.model} is over {fewest} to {tokens} tokens, not {sorted(grid)}")
    counts = sorted({tokens, fewest, *(count for count in wanted if count > fewest)}, reverse=True)
    reads = [tokens] if mode == "stale" or plan.depth == 1 else counts
    outputs = [*counts, head] if 0 < head < fewest else counts
    return [(n, k) for n in reads for k in outputs if k <= n]
