"""The readers that are fuzzed, and how many of the inputs each gets."""

from __future__ import annotations

import math

from benchmarks.fuzz.readers import arrays, datasets, finetuning, folders, graphs, handover, records, weights
from benchmarks.fuzz.target import Target

TARGETS: tuple[Target, ...] = (
    *records.TARGETS,
    *arrays.TARGETS,
    *graphs.TARGETS,
    *weights.TARGETS,
    *finetuning.TARGETS,
    *datasets.TARGETS,
    *folders.TARGETS,
    *handover.TARGETS,
)


def counts(targets: tuple[Target, ...], inputs: int) -> dict[str, int]:
    """How many inputs each reader gets: its share of ``inputs``, at least one; the first takes what rounding leaves."""
    total = math.fsum(target.share for target in targets)
    found = {target.name: max(1, int(inputs * target.share / total)) for target in targets}
    found[targets[0].name] += max(0, inputs - sum(found.values()))
    return found
