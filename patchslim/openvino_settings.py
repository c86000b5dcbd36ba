"""What OpenVINO is told to run a model: spelt once, for the runner, the manifest and the options. Cheap to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from patchslim.choices import InferencePrecision, PerformanceHint

_PRECISION, _HINT = "INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT"


@dataclass(frozen=True)
class OpenVinoSettings:
    """How OpenVINO runs a model.

    ``precision`` is what it computes in where nothing is quantised; a CPU without bfloat16 takes f32 whatever is asked for.
    ``hint`` latency gives all cores to one batch, throughput divides them among several that run at once. ``threads`` 0 leaves
    their number to OpenVINO. ``cache`` is a folder in which what it compiles of an IR is kept.
    """

    precision: InferencePrecision = "f32"
    hint: PerformanceHint = "latency"
    threads: int = 0
    cache: Path | None = None

    @classmethod
    def of_record(cls, stated: Mapping[str, object]) -> OpenVinoSettings:
        """What ``record`` was written by; the default for what is not there, or unknown."""
        hint: PerformanceHint = "throughput" if stated.get(_HINT) == "THROUGHPUT" else "latency"
        return cls("bf16" if stated.get(_PRECISION) == "bf16" else "f32", hint)

    def record(self) -> dict[str, str]:
        """What a manifest says of it, by the names of OpenVINO's properties: that which does not depend on the machine."""
        return {_PRECISION: self.precision, _HINT: self.hint.upper()}

    def properties(self) -> dict[str, object]:
        """What OpenVINO is given."""
        return {**self.record(), **({"INFERENCE_NUM_THREADS": self.threads} if self.threads else {})}
