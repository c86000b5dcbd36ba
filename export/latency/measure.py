"""Measures the ``LatencyTable`` of a model: one block, as a plan lays it, timed over a grid of token counts on one engine.

The engine is ONNX Runtime, on the execution provider that the export would run it on, or TensorRT on this machine's GPU.
Executed on CPUs only so far: of TensorRT the blocks have been built, not timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.latency.block_extraction import HEAD, STEM, WHOLE, Key, ModelParts
from export.latency.timed_runs import OnnxRuntime, Run, TensorRt
from patchslim.choices import Layout, Mode
from patchslim.errors import Unavailable, UsageError
from patchslim.latency_table import LatencyPoint, LatencyTable
from patchslim.plan import SlimPlan
from patchslim.progress import StageProgress
from patchslim.timing import interleaved, level_rounds

if TYPE_CHECKING:
    from patchslim.choices import EngineName, Precision

#: Parts of N at which a block is measured unless a grid is given; the prefix tokens alone, and what the head reads, are added.
FRACTIONS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1)
ROUNDS = 15


def measure_table(
    dense_onnx: Path,
    model_plan: SlimPlan,
    *,
    layout: Layout,
    mode: Mode,
    merged: bool = False,
    engine: EngineName = "ort",
    precision: Precision = "fp32",
    batch: int = 8,
    threads: int | None = None,
    grid: Sequence[int] | None = None,
    rounds: int = ROUNDS,
    progress: StageProgress | None = None,
) -> LatencyTable:
    """Time a block of ``dense_onnx`` for every (tokens in, tokens out) of ``grid``, and the dense model and its two ends.

    ``model_plan`` is any plan of the model: its sizes are used, its cuts are not. ``grid`` are token counts between the prefix
    tokens and N. Every block is cut by the same passes as a slim model, then taken out of it and run alone on ``batch`` random
    inputs, with ``threads`` threads (None: the engine's choice) that do not spin while another one runs. All are timed in
    turn, in a new order each of ``rounds`` rounds; a point is its median, less what made whole rounds slow (``level_rounds``).
    The ends are measured by themselves, not as what full blocks leave of the whole: a difference of large noisy times can even
    be negative. One thread is timed by its CPU time, several by wall time. ``progress`` is called with (stage, done, total).

    Raises ``Unavailable`` where the engine cannot run blocks here, ``InputRejected`` for an ONNX file that is not understood
    or that ``model_plan`` does not fit, ``UsageError`` for an impossible grid, batch, thread count or number of rounds.
    """
    for name, value in {"batch": batch, "threads": 1 if threads is None else threads, "rounds": rounds}.items():
        if value < 1:
            raise UsageError(f"a latency table needs at least 1 for {name}, not {value}")
    report = progress or (lambda stage, done, total: None)
    counts = _grid(model_plan, mode, grid)
    on = _tensorrt(precision, batch) if engine == "trt" else OnnxRuntime(dense_onnx, threads, batch)
    try:
        with tempfile.TemporaryDirectory(prefix="patchslim-") as folder:
            runs: list[Run] = []
            parts = ModelParts(dense_onnx, model_plan, layout, mode, merged, precision, batch)
            keys: list[Key] = [WHOLE, STEM, HEAD, *counts]
            for done, key in enumerate(keys):
                path = Path(folder) / f"{done}.onnx"
                parts.write(key, path)
                runs.append(on.open(path))
                path.unlink()
                report("cutting blocks to time", done + 1, len(keys))
            timed = interleaved(runs, rounds, progress=lambda done, total: report("timing blocks", done, total))
    finally:
        on.close()
    low, middle, high = np.percentile(level_rounds(np.array(timed)), [25, 50, 75], axis=0) * 1e3
    medians = dict(zip(keys, middle.tolist(), strict=True))
    return LatencyTable(
        model=model_plan.model,
        tokens=model_plan.tokens,
        depth=model_plan.depth,
        geometry=model_plan.geometry,
        mode=mode,
        layout=layout,
        merged=merged,
        engine=engine,
        engine_version=on.version,
        precision=precision,
        device=on.device,
        threads=on.threads,
        batch=batch,
        points=[LatencyPoint(tokens_in=n, tokens_out=k, ms=medians[n, k]) for n, k in counts],
        fixed_ms=medians[STEM] + medians[HEAD],
        dense_ms=medians[WHOLE],
        repeats=rounds,
        spread=float(np.median((high - low) / middle)),
    )


def _tensorrt(precision: Precision, batch: int) -> TensorRt:
    """TensorRT on this machine's GPU; raises ``Unavailable``, with what to do instead, where there is none."""
    from export.engines import cuda

    target = cuda.local_target()
    if target is None:
        raise Unavailable(
            "a latency budget for trt needs a latency table measured on the target GPU, and this machine has no CUDA driver or "
            "GPU; pass --macs-reduction instead, or a latency table that was measured elsewhere"
        )
    return TensorRt(target, precision, batch)


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
