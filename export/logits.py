"""What every stage answers on the held-out images, kept in the work folder stage by stage."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.engines.base import EngineResult
from export.engines.onnx_runtime import open_runner
from export.source import ExportSource, LazyModule
from export.stage_names import ALONE, PYTORCH, PYTORCH_SLIM, StageNames
from export.stages import Workspace, onnxruntime_providers
from patchslim import cuda
from patchslim.arrays import Array
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.packages import missing
from patchslim.plan import SlimPlan
from patchslim.runner import infer_in_batches
from patchslim.work_folder import TENSORRT_CACHE
from validate.parity import logit_errors

if TYPE_CHECKING:
    from patchslim.runner import Runner
    from slimming.models.slim_vit import SlimViT

#: Images whose pixels are kept: they are the inputs of ``golden.npz``, and the first is drawn.
GOLDEN_IMAGES = 8
#: Batches in which they are run again; the last does not divide them.
BATCH_SIZES = (1, 2, 3)
#: What OpenVINO compiled, in the work folder; what is damaged there is compiled anew.
OPENVINO_CACHE = "openvino"


@dataclass(frozen=True)
class AnsweringStage:
    """A stage that answers images with logits; ``key`` decides its answers beside the original model and the images."""

    key: object
    open: Callable[[], Runner]


@dataclass(frozen=True)
class BuiltGraphs:
    """An engine, the ONNX files behind it by stage, and what its stages are called."""

    graphs: Mapping[str, Path]
    engine: EngineResult
    names: StageNames = ALONE


def answering_stages(
    source: ExportSource, plan: SlimPlan, fitted: LazyModule, built: BuiltGraphs, work: Workspace
) -> dict[str, AnsweringStage]:
    """What is measured, by stage name and in order; an engine with files of its own is a stage where it can run here."""
    engine, names = built.engine, built.names

    def original() -> Runner:
        from export.inference import TorchRunner

        return TorchRunner(source.original.load(), PYTORCH)

    def slimmed() -> Runner:
        from export.inference import TorchRunner

        return TorchRunner(slimmed_module(source, plan, fitted), PYTORCH_SLIM)

    stages = {
        PYTORCH: AnsweringStage("original", original),
        PYTORCH_SLIM: AnsweringStage(plan.model_dump(mode="json", include={"kept", "mode", "merged_into", "weights"}), slimmed),
    }
    for stage, path in built.graphs.items():
        if stage == names.onnx("bf16"):  # ONNX Runtime has no kernels of it on a CPU
            if not missing(["openvino"]):
                stages[stage] = AnsweringStage([work.facts.digest(path), "openvino"], functools.partial(_open_bf16, path, work))
            continue
        stages[stage] = AnsweringStage(work.facts.digest(path), functools.partial(_open_graph, path, work))
    if engine.executed and engine.files:
        key = [*(work.facts.digest(file) for file in engine.files), engine.settings]
        stages[names.engine] = AnsweringStage(key, functools.partial(_open_engine, engine, work))
    return stages


def slimmed_module(source: ExportSource, plan: SlimPlan, fitted: LazyModule) -> SlimViT:
    """The PyTorch reference of the slim model, where the original is."""
    from slimming.models.slim_vit import SlimViT

    return SlimViT(fitted.load(), plan).to(source.model.device).eval()


def _open_graph(path: Path, work: Workspace) -> Runner:
    return open_runner(work.cache.verified(path))


def _open_bf16(path: Path, work: Workspace) -> Runner:
    from patchslim.openvino_runner import OpenVinoRunner

    return OpenVinoRunner(work.cache.verified(path))


def _open_engine(engine: EngineResult, work: Workspace) -> Runner:
    first, *_ = [work.cache.verified(file) for file in engine.files]
    if engine.backend == "openvino":
        from patchslim.openvino_runner import OpenVinoRunner

        settings = OpenVinoSettings.of_record(engine.settings)
        return OpenVinoRunner(first, dataclasses.replace(settings, cache=work.cache.root / OPENVINO_CACHE))
    from patchslim.tensorrt_runner import TrtRunner

    weights = None if engine.weights is None else work.cache.verified(engine.weights)
    return TrtRunner(first, engine.backend, weights=weights, cache=work.cache.root / TENSORRT_CACHE)


@dataclass(frozen=True)
class Measured:
    """What every stage answered on the held-out images: logits (n, classes) float32 by stage, and the images' classes (n,).

    ``inputs`` are the pixels (k, 3, h, w) float32 of the first ``GOLDEN_IMAGES`` of them; ``batch_errors`` by stage the largest
    difference of a logit of theirs where they are run in batches of ``BATCH_SIZES``, NaN where none is finite.
    """

    logits: dict[str, Array]
    targets: Array
    inputs: Array
    batch_errors: dict[str, float]


def measured_logits(stages: Mapping[str, AnsweringStage], source: ExportSource, batch_size: int, work: Workspace) -> Measured:
    """The logits of every stage on the held-out images; only stages that are not there yet are run.

    Raises ``InputRejected`` for an image that cannot be read or a class that the model does not have.
    """
    shared = {
        "images": source.evaluation_fingerprint,
        "model": source.model.key,
        "device": (source.model.device, cuda.local_target(), onnxruntime_providers(work.facts)),
        "batch": batch_size,  # libraries sum in another order, which the last bits of a logit show
        "batches": BATCH_SIZES,
    }
    folders = {name: work.cache.path("logits", key=stage.key, **shared) for name, stage in stages.items()}
    absent = [name for name, folder in folders.items() if not work.cache.has(folder)]
    if absent:
        from export.inference import infer_all

        runners = {name: stages[name].open() for name in absent}
        images = source.evaluation_images
        work.reporter.say(f"measuring {', '.join(absent)} on {len(images)} held-out images")
        with work.reporter.bar("parity") as progress:
            answers = infer_all(
                runners, images, source.session.transform, batch_size=batch_size, keep=GOLDEN_IMAGES, progress=progress
            )
        answers.check_classes(images.address, source.model.classes)
        for name, logits in answers.logits.items():
            error = batch_error(runners[name], answers.inputs, logits[: len(answers.inputs)])

            def build(part: Path, logits: Array = logits, error: float = error) -> None:
                np.save(part / "logits.npy", logits)
                np.save(part / "targets.npy", answers.targets)
                np.save(part / "inputs.npy", answers.inputs)
                np.save(part / "batch_error.npy", np.float64(error))

            work.cache.make(folders[name], build)
    read = {name: _read(folder, "logits", work) for name, folder in folders.items()}
    errors = {name: float(_read(folder, "batch_error", work)) for name, folder in folders.items()}
    return Measured(read, _read(folders[PYTORCH], "targets", work), _read(folders[PYTORCH], "inputs", work), errors)


def batch_error(runner: Runner, inputs: Array, logits: Array) -> float:
    """The largest difference from ``logits`` (k, classes) where ``inputs`` (k, 3, h, w) are run in batches of ``BATCH_SIZES``.

    NaN where some logit is not finite in one of the runs alone, or in all of both.
    """
    worst = 0.0
    for size in BATCH_SIZES:
        again = infer_in_batches(runner, inputs, size)
        error, _ = logit_errors(again, logits)
        if error is None or not np.array_equal(np.isfinite(again), np.isfinite(logits)):
            return math.nan
        worst = max(worst, error)
    return worst


def _read(folder: Path, name: str, work: Workspace) -> Array:
    array: Array = np.load(io.BytesIO(work.cache.read(folder / f"{name}.npy")), allow_pickle=False)
    return array
