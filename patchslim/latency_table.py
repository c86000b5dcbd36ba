"""``LatencyTable``: milliseconds of one block by the tokens that it reads and outputs, as measured on one engine.

Free of torch: a search reads it, a bundle keeps it. ``export.latency.measure`` measures it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from patchslim.choices import EngineName, Layout, Mode, Precision
from patchslim.errors import InputRejected
from patchslim.macs import Geometry, check_counts
from patchslim.plan import SlimPlan
from patchslim.records import Count, StrictRecord, VersionOne, load_record, save_record

_Ms = Annotated[float, Field(gt=0)]


class LatencyPoint(StrictRecord):
    """One measured block."""

    tokens_in: Count = Field(description="tokens that the block reads")
    tokens_out: Count = Field(description="tokens whose output it computes")
    ms: _Ms = Field(description="median time of one batch, milliseconds; with one thread its CPU time")


class LatencyTable(StrictRecord):
    """Times of one block of a model on one engine, over a grid of token counts; all of whole batches.

    Blocks are taken to be alike. A ``slimming.search.costs.Cost`` in milliseconds.
    """

    schema_version: VersionOne = 1
    model: str
    tokens: Count = Field(description="N, prefix tokens included")
    depth: Count = Field(description="number of blocks")
    geometry: Geometry
    mode: Mode = Field(description="of the blocks measured; stale blocks read every token")
    layout: Layout = Field(description="of the projections in the blocks measured")
    merged: bool = Field(default=False, description="whether the blocks merge the tokens that they drop")
    engine: EngineName
    engine_version: str
    precision: Precision
    device: str = Field(description="name of the processor, and the execution provider where it is not the CPU's")
    threads: Annotated[int, Field(ge=1)] | None = Field(description="threads of the engine; null: its own choice")
    batch: Count = Field(description="images per batch")
    points: list[LatencyPoint] = Field(min_length=1, max_length=10_000)
    fixed_ms: Annotated[float, Field(ge=0)] = Field(description="patch embedding, final norm and head")
    dense_ms: _Ms = Field(description="the whole model with no token dropped, through the same passes")
    repeats: Count = Field(description="times that each point was measured, in rounds over all of them")
    spread: Annotated[float, Field(ge=0)] = Field(description="median over the points of interquartile range / median time")

    @model_validator(mode="after")
    def _check(self) -> LatencyTable:
        measured = {(point.tokens_in, point.tokens_out) for point in self.points}
        if len(measured) != len(self.points):
            raise ValueError("points: the same token counts twice")
        for n, k in measured:
            if k > n:
                raise ValueError(f"points: a block cannot output {k} of {n} tokens")
        if max(n for n, _ in measured) != self.tokens or (self.tokens, self.tokens) not in measured:
            raise ValueError(f"points: the largest must be of the full block, {self.tokens} tokens in and out")
        reads = sorted({n for n, _ in measured})
        if self.mode == "stale" and reads != [self.tokens]:
            raise ValueError(f"points: a block in stale form reads all {self.tokens} tokens")
        outputs = {k for _, k in measured}
        for n in reads:
            if missing := sorted(k for k in outputs | {n} if k <= n and (n, k) not in measured):
                raise ValueError(f"points: the grid has a hole at {n} tokens in, {missing[0]} out")
        if stray := sorted(k for k in outputs if k > reads[0] and k not in reads) if len(reads) > 1 else []:
            raise ValueError(f"points: {stray[0]} tokens out, but no block that reads {stray[0]}")
        return self

    @property
    def unit(self) -> str:
        """``ms``, of one batch."""
        return "ms"

    @cached_property
    def _grid(self) -> _Grid:
        return _Grid({(point.tokens_in, point.tokens_out): point.ms for point in self.points})

    @cached_property
    def _scale(self) -> float:
        """Factor on block times that makes ends and full blocks add up to ``dense_ms``; 1 where the ends alone exceed it."""
        blocks = self.dense_ms - self.fixed_ms
        return blocks / (self.depth * self._grid.at(self.tokens, self.tokens)) if blocks > 0 else 1.0

    def block_ms(self, tokens_in: int, tokens_out: int) -> float:
        """Return the milliseconds of one block alone that reads ``tokens_in`` tokens and outputs ``tokens_out`` of them.

        Bilinear between the points of the grid (linear on the half cells along its diagonal), constant below its smallest
        counts. More tokens never cost less: points that noise has put out of order are first moved onto the nearest monotone
        surface, the others are met exactly. Raises ``ValueError`` unless 1 <= tokens_out <= tokens_in <= N.
        """
        check_counts([tokens_in, tokens_out], self.tokens, 2)
        return self._grid.at(self.tokens if self.mode == "stale" else tokens_in, tokens_out)

    def of(self, counts: Sequence[int]) -> float:
        """Return the milliseconds of a batch under a plan of these ``counts``: the ends, and each block on what it reads.

        Blocks are scaled by one factor that makes the dense model what it was measured to be: alone, a block starts with cold
        caches and lacks fusions with its neighbours. Raises ``ValueError`` for counts that no plan can have.
        """
        check_counts(counts, self.tokens, self.depth)
        reads = [self.tokens, *counts[:-1]]
        return self.fixed_ms + self._scale * sum(self.block_ms(n, k) for n, k in zip(reads, counts, strict=True))

    def dense(self) -> float:
        """Milliseconds of a batch when no token is dropped."""
        return self.of([self.tokens] * self.depth)

    def ensure_fits(self, plan: SlimPlan, layout: Layout, merged: bool = False) -> None:
        """Raise ``InputRejected`` unless the table is for the model, mode and layout of ``plan``: a plan of that model.

        ``merged``: whether dropped tokens are to be merged.
        """
        wanted = {
            "model": plan.model,
            "tokens": plan.tokens,
            "depth": plan.depth,
            "geometry": plan.geometry,
            "mode": plan.mode,
            "layout": layout,
            "merged": merged,
        }
        faults = [f"{key}: {getattr(self, key)}, not {value}" for key, value in wanted.items() if getattr(self, key) != value]
        if faults:
            hint = "" if self.merged == merged else f"; --score {'similarity' if self.merged else 'paper'} goes with it"
            raise InputRejected(f"the latency table was measured for something else: {'; '.join(faults)}{hint}")

    def save(self, path: Path) -> None:
        """Write the table as JSON, whole or not at all; raises ``OSError``."""
        save_record(path, self)


class _Grid:
    """A monotone surface over the lower triangle tokens_out <= tokens_in, from its measured points."""

    def __init__(self, measured: dict[tuple[int, int], float]) -> None:
        self.reads = sorted({n for n, _ in measured})
        self.outputs = sorted({k for _, k in measured})
        # The nearest monotone surface in the maximum norm: "Basic" in Stout, Strict L-infinity isotonic regression, 2012.
        floor, ceiling = self._running(measured, max, 1), self._running(measured, min, -1)
        self.values = {place: (floor[place] + ceiling[place]) / 2 for place in measured}

    def _running(
        self, measured: dict[tuple[int, int], float], choose: Callable[[list[float]], float], step: int
    ) -> dict[tuple[int, int], float]:
        """Each point's maximum over the points of no more tokens (``step`` 1), or minimum over those of no fewer (-1)."""
        bound: dict[tuple[int, int], float] = {}
        reads, outputs = self.reads[::step], self.outputs[::step]
        for n, row_before in zip(reads, [0, *reads], strict=False):
            for k, column_before in zip(outputs, [0, *outputs], strict=False):
                if (n, k) in measured:
                    before = [place for place in ((row_before, k), (n, column_before)) if place in bound]
                    bound[n, k] = choose([measured[n, k], *(bound[place] for place in before)])
        return bound

    def at(self, n: int, k: int) -> float:
        """The surface at ``n`` tokens in and ``k`` out."""
        n0, n1, s = _cell(self.reads, n)
        k0, k1, t = _cell(self.outputs, k)
        value = self.values
        if k1 > n0:  # the half of a cell on the diagonal that has tokens_out <= tokens_in; (n0, k1) is not in the triangle
            return value[n0, k0] + s * (value[n1, k0] - value[n0, k0]) + t * (value[n1, k1] - value[n1, k0])
        low = value[n0, k0] + t * (value[n0, k1] - value[n0, k0])
        high = value[n1, k0] + t * (value[n1, k1] - value[n1, k0])
        return low + s * (high - low)


def _cell(grid: list[int], at: int) -> tuple[int, int, float]:
    """The grid values around ``at`` and how far it is from the first to the second; both the same on and below the grid."""
    index = bisect_left(grid, at)
    if index == 0 or grid[index] == at:
        return grid[index], grid[index], 0.0
    low, high = grid[index - 1], grid[index]
    return low, high, (at - low) / (high - low)


def load_table(path: Path) -> LatencyTable:
    """Read and check a saved table; raises ``InputRejected`` naming the file and the fault."""
    return load_record(path, LatencyTable, "latency table")


def latency_table_schema() -> dict[str, object]:
    """The JSON Schema of a saved table."""
    return LatencyTable.model_json_schema()
