"""How long engines take on this CPU, all of them in turn: what the fastest is chosen by."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from export.engines.base import EngineResult
from export.stages import Workspace
from patchslim.arrays import Array
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.records import StrictRecord, load_record, save_record
from patchslim.timing import interleaved, processor_name, timed

if TYPE_CHECKING:
    from patchslim.openvino_runner import OpenVinoRunner
    from patchslim.ort_runner import OrtRunner

#: Images of a batch.
TIMED_BATCH = 8
_ROUNDS = 15
_Key = TypeVar("_Key", bound=str)


@dataclass(frozen=True)
class Timed:
    """An engine for a CPU, and the ONNX file that it was built from, or is."""

    engine: EngineResult
    served: Path

    @property
    def files(self) -> list[Path]:
        """What is run."""
        return self.engine.files or [self.served]

    def open(self, work: Workspace) -> OpenVinoRunner | OrtRunner:
        """It, ready to run on all cores."""
        first, *_ = [work.cache.verified(file) for file in self.files]
        if self.engine.backend == "openvino":
            from patchslim.openvino_runner import OpenVinoRunner

            return OpenVinoRunner(first, OpenVinoSettings.of_record(self.engine.settings))
        from patchslim.ort_runner import OrtRunner

        return OrtRunner(first)


class _Times(StrictRecord):
    """Median times of a batch, milliseconds, by what was compared."""

    ms: dict[str, float]


def engine_times(engines: Mapping[_Key, Timed], work: Workspace, what: str) -> dict[_Key, float]:
    """Median milliseconds of a batch of ``TIMED_BATCH`` images in each engine, in turn on all cores, measured once.

    ``what`` they are is said meanwhile: engines, precisions.
    """
    folder = work.cache.path(
        "engine-times",
        engines={name: [work.facts.digest(file) for file in one.files] for name, one in engines.items()},
        settings={name: [one.engine.backend, one.engine.settings] for name, one in engines.items()},
        machine=(platform.node(), processor_name(), os.cpu_count()),
    )

    def build(part: Path) -> None:
        runs = []
        for one in engines.values():
            runner = one.open(work)
            values = np.random.default_rng(0).standard_normal((TIMED_BATCH, *runner.image_shape)).astype(runner.dtype)
            runs.append(timed(functools.partial(runner.infer, values), time.perf_counter))
        with work.reporter.bar(f"timing {what}", unit="rounds") as progress:
            rounds: Array = np.array(interleaved(runs, _ROUNDS, progress=progress))
        medians = np.median(rounds, axis=0) * 1e3
        save_record(part / "times.json", _Times(ms=dict(zip(engines, medians.tolist(), strict=True))))

    work.cache.make(folder, build)
    ms = load_record(work.cache.verified(folder / "times.json"), _Times, "record of times").ms
    return {name: ms[name] for name in engines}
