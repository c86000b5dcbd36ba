"""Runs of one ONNX file on an engine, timed alone: what a latency table is made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from export.engines.base import BuildOptions
from export.engines.onnx_info import OnnxFacts
from export.engines.openvino_build import inference_precision
from export.engines.tensorrt_build import build_files, choose_backend
from patchslim import cuda
from patchslim.errors import Unavailable
from patchslim.timing import fair_clock, processor_name, timed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.latency.conditions import TimingConditions
    from patchslim.choices import EngineName, Precision
    from patchslim.tensorrt_runner import TrtRunner


#: Runs an ONNX file that is ready on its engine once, and returns the seconds that it took.
Run = Callable[[], float]


def random_values(batch: int, shape: Sequence[int | str]) -> NDArray[np.float64]:
    """A batch of standard normal numbers for an input of ``shape``, always the same."""
    return np.random.default_rng(0).standard_normal([batch, *map(int, shape[1:])])


class PartTimer(Protocol):
    """An engine that times parts of a model."""

    @property
    def version(self) -> str:
        """The engine's version."""

    @property
    def device(self) -> str:
        """The processor's name, with the execution provider where it is not the CPU's."""

    @property
    def threads(self) -> int | None:
        """Threads of the engine; None: its own choice."""

    def open(self, path: Path) -> Run:
        """Make an ONNX file of one input and static shapes ready to run; the file is not needed afterwards."""

    def close(self) -> None:
        """Free what the runs hold; none of them can be used afterwards."""


def open_timer(dense: Path, conditions: TimingConditions) -> PartTimer:
    """The timer of the engine that parts of the ``dense`` model are to be run on.

    Raises ``Unavailable`` where the engine cannot run here.
    """
    return _TIMERS[conditions.engine](dense, conditions)


class OrtTimer:
    """Times parts in ONNX Runtime, with the execution provider that the engine itself would choose for the dense model."""

    def __init__(self, dense: Path, conditions: TimingConditions) -> None:
        import onnxruntime

        from export.engines.onnx_runtime import open_runner

        self.threads, self.batch = conditions.threads, conditions.batch
        with open_runner(dense) as runner:
            self.provider = runner.provider
        self.version: str = onnxruntime.__version__
        self.device = _processor(self.provider)

    def open(self, path: Path) -> Run:
        """Load an ONNX file; it is not needed afterwards."""
        from patchslim.ort_runner import CPU, OrtModel

        model = OrtModel(path, provider=self.provider, threads=self.threads or 0)
        # The input is already where it is read: copies are not part of a block.
        run = model.bound(random_values(self.batch, model.inputs[0].shape))
        return timed(run, fair_clock(self.threads, on_cpu=self.provider == CPU))

    def close(self) -> None:
        """Nothing to give back: sessions end with their runs."""


class OpenVinoTimer:
    """Times parts in OpenVINO on the CPU, in the precision that the engine would have."""

    def __init__(self, dense: Path, conditions: TimingConditions) -> None:
        from patchslim.openvino_runner import openvino_version

        self.threads, self.batch = conditions.threads, conditions.batch
        self.precision = inference_precision(conditions.precision)
        self.version = openvino_version()
        self.device = f"{_processor('CPUExecutionProvider')}, {self.precision}"

    def open(self, path: Path) -> Run:
        """Compile an ONNX file; it is not needed afterwards."""
        from patchslim.openvino_runner import OpenVinoModel
        from patchslim.openvino_settings import OpenVinoSettings

        model = OpenVinoModel(path, OpenVinoSettings(self.precision, threads=self.threads or 0))
        values = random_values(self.batch, model.inputs[0].shape).astype(model.dtype_of(model.inputs[0]))
        return timed(lambda: model.run(values), fair_clock(self.threads, on_cpu=True))

    def close(self) -> None:
        """Nothing to give back: models end with their runs."""


class TensorRtTimer:
    """Times parts in TensorRT on this machine's GPU, each built into an engine of its own.

    Building is executed (by TensorRT-RTX, also without a GPU), running is not yet. ``close`` gives the GPU's memory back.
    Raises ``Unavailable`` where none can build for ``target``.
    """

    def __init__(self, target: str, precision: Precision, batch: int) -> None:
        self.backend = choose_backend((target,), precision)
        self.target, self.precision, self.batch = target, precision, batch
        self.version = ""  # known once something is built
        self.device = f"{target} ({self.backend.name})"
        self.threads = None
        self._runners: list[TrtRunner] = []

    def build(self, path: Path) -> Path:
        """The engine of an ONNX file whose one input has a static shape, beside it; raises as ``build_engine`` does."""
        import onnx

        name = onnx.load(str(path), load_external_data=False).graph.input[0].name
        facts = OnnxFacts(name, (0, 0, 0), self.batch, [], self.precision)  # a static shape: no size of images is needed
        options = BuildOptions((self.target,), self.precision, (self.batch,) * 3)
        built = build_files(path, path.parent, facts, self.backend, options)
        self.version = built.version
        return built.files[0]

    def open(self, path: Path) -> Run:
        """Build an ONNX file and load its engine; raises as ``build_engine`` and ``TrtRunner`` do."""
        from patchslim.tensorrt_runner import TrtRunner

        runner = TrtRunner(self.build(path), self.backend.name)
        self._runners.append(runner)
        return runner.timed(random_values(self.batch, runner.input_shape))

    def close(self) -> None:
        """Give back the GPU's memory; no run that was opened here can be used afterwards."""
        while self._runners:
            self._runners.pop().close()


def _processor(provider: str) -> str:
    """The processor's name; on a GPU its architecture."""
    if provider != "CPUExecutionProvider":
        return f"{cuda.local_target()} ({provider})"
    return f"{processor_name()}, {os.cpu_count()} logical cores"


def _tensorrt(dense: Path, conditions: TimingConditions) -> TensorRtTimer:
    target = cuda.local_target()
    if target is None:
        raise Unavailable(
            "a latency budget for trt needs a latency table measured on the target GPU, and this machine has no CUDA driver or "
            "GPU; pass --macs-reduction instead, or a latency table that was measured elsewhere"
        )
    return TensorRtTimer(target, conditions.precision, conditions.batch)


_TIMERS: dict[EngineName, Callable[[Path, TimingConditions], PartTimer]] = {
    "ort": OrtTimer,
    "openvino": OpenVinoTimer,
    "trt": _tensorrt,
}
