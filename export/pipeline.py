"""From options to a published bundle: the stages in order, the gate, and what goes into the folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.bundle import check_place, fill_bundle, publish
from export.cache import StageCache
from export.engines.base import EngineResult
from export.options import ExportOptions
from export.parity import parity_report
from export.stages import ONNX_FP16, ONNX_SLIM, Stages
from patchslim.errors import ParityFailed
from patchslim.plan import SlimPlan
from patchslim.progress import Reporter
from slimming.session import open_session
from validate import manifest as schema


@dataclass(frozen=True)
class Outcome:
    """A finished export."""

    bundle: Path
    plan: SlimPlan
    macs: schema.Macs
    parity: schema.ParityReport
    engine: EngineResult
    size: int  # bytes of the bundle
    dense_onnx: Path


class GateFailed(ParityFailed):
    """A stage failed its gate; ``outcome`` is the export that is not published, its bundle in the work folder."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


def export_bundle(options: ExportOptions) -> Outcome:
    """Run the whole export and publish the bundle.

    Raises ``PatchslimError``; in particular ``GateFailed`` when a stage fails its gate: then nothing is published, and the
    bundle stays in the work folder under a name that ends in ``.failed``.
    """
    options.check()
    check_place(options.bundle)
    reporter = Reporter()
    if options.engine == "trt":  # before anything slow: is there something to build with?
        from export.engines.tensorrt_build import choose_backend

        backend = choose_backend(options.targets, options.engine_precision)
        reporter.say(f"engine: {backend.name} for {', '.join(backend.targets)}")
    images = evaluation_images(options)
    session = open_session(options, images)
    stages = Stages(options, session, StageCache(options.work_folder), reporter)
    plan = stages.plan()
    fitted = stages.fitted(plan)
    dense = stages.dense_onnx(fitted)
    graphs = stages.slim_onnx(dense, plan)
    engine = stages.engine(graphs.get(ONNX_FP16, graphs[ONNX_SLIM]))
    logits, targets = stages.logits(images, plan, fitted, graphs, engine)
    parity = parity_report(options, plan, engine, images, stages, logits, targets)

    def fill(folder: Path) -> schema.Manifest:
        return fill_bundle(folder, stages, images, plan, graphs, engine, logits, targets, parity)

    folder = options.bundle if parity.passed else options.work_folder / f"{options.bundle.name}.failed"
    publish(fill, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    outcome = Outcome(folder, plan, parity.macs, parity, engine, size, dense)
    if not parity.passed:
        faults = "; ".join(f"{one.stage}: {one.note}" for one in parity.rungs if one.status == "failed")
        old = f"; {options.bundle} is an earlier one" if options.bundle.exists() else ""
        raise GateFailed(f"the bundle is not published{old}: {faults}. It stays, marked failed, in {folder}", outcome)
    return outcome


def describe(options: ExportOptions) -> dict[str, Any]:
    """What ``export_bundle`` would do with these options, and which of its slow stages are in the work folder already.

    Raises the ``PatchslimError`` that the run would meet before its first slow stage.
    """
    options.check()
    check_place(options.bundle)
    targets = ["cpu"]
    backend = "onnxruntime"
    if options.engine == "trt":
        from export.engines.tensorrt_build import choose_backend

        chosen = choose_backend(options.targets, options.engine_precision)
        backend, targets = chosen.name, list(chosen.targets)
    images = evaluation_images(options)
    session = open_session(options, images)
    stages = Stages(options, session, StageCache(options.work_folder), Reporter())
    if options.plan is not None or options.dense:
        stages.plan()  # read and compared with the model
        plan = str(options.plan or "dense")
    else:
        plan = "found already" if stages.plan_folder().is_dir() else "to be searched"
    return {
        "model": session.loaded.architecture,
        "weights": session.loaded.weights,
        "preprocessing": session.loaded.data_config,
        "calibration": session.calibration.describe(),
        "evaluation": images.describe(),
        "plan": plan,
        "backend": backend,
        "targets": targets,
        "precision": options.engine_precision,
        "work": str(options.work_folder),
        "bundle": str(options.bundle),
    }


def evaluation_images(options: ExportOptions) -> Any:
    """The held-out images that the options ask for."""
    from slimming.data.source import evaluation_set

    return evaluation_set(options.data, None if options.eval_images == "all" else options.eval_images)
