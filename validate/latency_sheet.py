"""``latency.json``: the slim graph against the dense one where the bundle was built, at a few batch sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from patchslim.ort_runner import CPU
from patchslim.records import StrictRecord, VersionOne
from patchslim.timing import processor_name
from validate.latency import LatencyReport, compare_latency

BATCHES = (1, 8)
_SECONDS = 2.0  # of timing at each batch size
_TOO_LONG_S = 4.0  # for a round of the next batch size


class LatencySheet(StrictRecord):
    """Times of one machine: they are a ratio to believe, and no promise for another machine."""

    schema_version: VersionOne = 1
    processor: Annotated[str, Field(max_length=1024)]
    runtime: Annotated[str, Field(max_length=256)] = Field(description="what ran the graphs, with its version")
    comparisons: list[LatencyReport] = Field(max_length=64)


def latency_sheet(dense: Path, slim: Path, macs_ratio: float) -> LatencySheet:
    """Time ``slim`` against ``dense`` in ONNX Runtime on one thread of this CPU, in a few seconds for a small ViT.

    A large model gets fewer rounds, and its larger batches are left out. Raises as ``compare_latency``.
    """
    import onnxruntime

    comparisons: list[LatencyReport] = []
    for batch in BATCHES:
        if comparisons:
            before = comparisons[-1]
            if (before.dense_ms + before.slim_ms) / 1e3 * batch / before.batch > _TOO_LONG_S:
                break
        comparisons.append(compare_latency(dense, slim, macs_ratio, batch=batch, threads=1, warmup=1, seconds=_SECONDS))
    runtime = f"ONNX Runtime {onnxruntime.__version__}, {CPU}"
    return LatencySheet(processor=processor_name(), runtime=runtime, comparisons=comparisons)


def latency_sheet_schema() -> dict[str, object]:
    """The JSON Schema of ``latency.json``."""
    return LatencySheet.model_json_schema()
