"""The stages that make files, in the order of the data: plan, dense ONNX, slim ONNX, engine, picture.

Each is a function of what it needs, and its result is kept in the work folder under a key of everything that decides it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.cache import FactStore, StageCache
from export.engines.base import ENGINES, QUANTISED, Backend, BuildProgress, BuildSettings, EngineResult
from export.engines.batches import DEFAULT_BATCH, Batch
from export.source import ExportSource, LazyModule, ModelFacts
from export.stage_names import ALONE, StageNames
from patchslim import cuda
from patchslim.arrays import Array
from patchslim.choices import EngineName, Layout, PerformanceHint, Precision
from patchslim.errors import InputRejected, Unavailable
from patchslim.latency_table import load_table
from patchslim.plan import SlimPlan, load_plan
from patchslim.progress import Reporter
from patchslim.work_folder import TENSORRT_CACHE
from slimming.session import search

if TYPE_CHECKING:
    from export.options import ExportOptions


@dataclass(frozen=True)
class Workspace:
    """Where stages are kept, and where it is said what is being done."""

    cache: StageCache
    reporter: Reporter

    @property
    def facts(self) -> FactStore:
        """What is known of files."""
        return self.cache.facts


@dataclass(frozen=True)
class EngineRequest:
    """The engine to build: by which backend, for which targets, of which precision, for which batches.

    ``names`` are what its stages are called, ``hint`` is what OpenVINO is told. ``profiles`` and ``settings`` are
    TensorRT's, as ``BuildOptions`` has them.
    """

    engine: EngineName
    backend: Backend
    precision: Precision
    batch: Batch = DEFAULT_BATCH
    names: StageNames = ALONE
    hint: PerformanceHint = "latency"
    profiles: tuple[Batch, ...] = ()
    settings: BuildSettings | None = None

    @property
    def told(self) -> dict[str, object]:
        """What a TensorRT builder is told that is not the default."""
        settings = {} if self.settings is None else {"settings": dataclasses.asdict(self.settings)}
        return settings | ({"profiles": self.profiles} if self.profiles else {})

    @property
    def graph(self) -> Precision:
        """The precision of the ONNX file that it is built from."""
        return ENGINES[self.engine].graph(self.precision)

    @property
    def typed(self) -> Precision:
        """The precision of the ONNX file that it is built from, or of that which is quantised to make it."""
        return ENGINES[self.engine].rest if self.graph in QUANTISED else self.graph

    @property
    def layout(self) -> Layout:
        """How cuts are laid for it."""
        return ENGINES[self.engine].layout


@dataclass(frozen=True)
class PlanFile:
    """A plan, and the ``plan.json`` that it was read from, which fitted weights lie beside; None for the dense plan."""

    plan: SlimPlan
    path: Path | None


def find_plan(options: ExportOptions, source: ExportSource, table: Path | None, work: Workspace) -> PlanFile:
    """The given plan, the dense one, or the one that the search finds, with its fitted weights beside it.

    ``table`` is what a latency budget is solved on. Raises ``BudgetUnreachable``; ``InputRejected`` for a given plan that does
    not fit the model.
    """
    if options.dense:
        return PlanFile(source.dense_plan, None)
    if options.plan is not None:
        return PlanFile(_given_plan(options.plan, source, work.facts), options.plan)
    folder = plan_folder(options, source, table, work)

    def build(part: Path) -> list[str]:
        from slimming.fitting.fitted_weights import save_fitted

        cost = None if table is None else load_table(table)
        checkpoint = folder.with_name(f"{folder.name}.checkpoint")
        with work.reporter.stages() as progress:
            found = search(options, source.session, options.search_layout, progress, cost=cost, checkpoint=checkpoint)
        save_fitted(found.plan, found.model, part / "plan.json", found.fit, found.finetune)
        shutil.rmtree(checkpoint, ignore_errors=True)
        unfitted = "the blocks end in norms, so they cannot be refitted in closed form: --fit none"
        chosen = [] if found.fit_reason is None else [f"--fit {found.fit}: {found.fit_reason}"]
        return [*chosen, *([unfitted] if found.fit == "none" and options.fit != "none" else [])]

    work.cache.make(folder, build)
    path = work.cache.verified(folder / "plan.json")
    return PlanFile(load_plan(path), path)


def plan_folder(options: ExportOptions, source: ExportSource, table: Path | None, work: Workspace) -> Path:
    """Where the plan that is searched for these options is, or will be."""
    distilled = dataclasses.asdict(options.request().distillation) if options.fit in ("distill", "auto") else None
    fit = (options.score, options.fit, options.summary, *([] if distilled is None else [distilled]))
    where = [] if options.merge_blocks is None else [options.merge_blocks]
    also = [options.other_layouts] if options.other_layouts else []
    finetune = (dataclasses.asdict(options.recipe), source.training_key()) if options.finetune_epochs else None
    return work.cache.path(
        "plan",
        model=source.model.key,
        images=source.calibration_fingerprint,
        described=source.calibration.describe(),
        budget=dataclasses.asdict(options.budget),
        form=(options.mode, options.search_layout, options.seed, source.model.device, *fit, *where, *also),
        latency=None if table is None else work.facts.digest(table),
        finetune=finetune,
    )


def _given_plan(path: Path, source: ExportSource, facts: FactStore) -> SlimPlan:
    plan = load_plan(path)

    def check() -> bool:
        from slimming.models.slim_vit import check_fits

        check_fits(source.session.loaded.module, plan)
        return True

    facts.recall("plan-fits", check, plan=plan.model_dump(mode="json"), model=source.model.key)
    if plan.model != source.model.architecture:  # the manifest names one model
        raise InputRejected(f"{path}: was made for {plan.model}, and --model is {source.model.architecture}")
    return plan


def fitted_model(planned: PlanFile, source: ExportSource, work: Workspace) -> LazyModule:
    """The module that runs under the plan: the original, or a copy with the weights that were fitted to the cut.

    Raises ``InputRejected`` where those beside a given plan are not there, or not the ones that it names.
    """
    plan, path = planned.plan, planned.path
    if plan.weights is None or path is None:
        return source.original

    weights = path.with_name(plan.weights.file or path.name)  # a bundle's plan names none, which load_fitted refuses

    @functools.cache
    def load() -> Any:
        from slimming.fitting.fitted_weights import load_fitted

        work.cache.verified(weights)
        return load_fitted(plan, path, source.session.loaded.module)

    if not path.is_relative_to(work.cache.root):  # what the search kept is whole; it is checked again when it is loaded
        work.facts.recall(
            "fitted", lambda: load() is not None, files=[weights], named=plan.weights.sha256, model=source.model.key
        )
    return LazyModule(plan.weights.sha256, load)


def dense_onnx(module: LazyModule, model: ModelFacts, work: Workspace) -> Path:
    """``module``, the original or its fitted copy, exported dense."""
    folder = dense_folder(module, model, work.cache)

    def build(part: Path) -> None:
        from export.onnx_export import export_dense

        work.reporter.say("exporting the dense model to ONNX")
        channels, height, width = model.data_config["input_size"]
        export_dense(module.load(), (channels, height, width), part / "dense.onnx")

    work.cache.make(folder, build)
    return folder / "dense.onnx"


def dense_folder(module: LazyModule, model: ModelFacts, cache: StageCache) -> Path:
    """Where the dense ONNX of ``module`` is, or will be."""
    return cache.path("dense", model=model.key | {"weights": module.weights_sha256})


def slim_onnx(dense: Path, plan: SlimPlan, request: EngineRequest, work: Workspace) -> dict[str, Path]:
    """The slim model by stage name: in float32, and typed where the ONNX file that is asked for is, or what that is made of."""
    layout, precision = request.layout, request.typed
    folder = work.cache.path(
        "slim", dense=work.facts.digest(dense), plan=plan.model_dump(mode="json"), layout=layout, precision=precision
    )

    def build(part: Path) -> None:
        from graph_passes import load_model, save_model, slim, to_fp16
        from graph_passes.bfloat16 import to_bf16

        work.reporter.say(f"cutting tokens out of the graph ({layout} qkv)")
        result = slim(load_model(work.cache.verified(dense)), plan, layout=layout)
        save_model(result.model, part / "model.onnx")
        if precision != "fp32":
            typed = {"fp16": to_fp16, "bf16": to_bf16}[precision]
            save_model(typed(result.model), part / f"model.{precision}.onnx")

    work.cache.make(folder, build)
    files = {request.names.slim: folder / "model.onnx"}
    if precision != "fp32":
        files[request.names.onnx(precision)] = folder / f"model.{precision}.onnx"
    return files


def built_engine(onnx: Path, request: EngineRequest, work: Workspace) -> EngineResult:
    """The engine that is asked for, built from ``onnx``. Raises as ``build_engine`` does."""
    folder = work.cache.path(
        "engine",
        onnx=work.facts.digest(onnx),
        engine=request.engine,
        backend=dataclasses.asdict(request.backend),
        precision=request.precision,
        batch=request.batch,
        hint=request.hint,
        **request.told,
        here=(cuda.local_target(), onnxruntime_providers(work.facts)),
    )

    def build(part: Path) -> None:
        from export.engines.build import build_engine

        with work.reporter.bar("building engines", unit="") as update:

            def progress(report: BuildProgress) -> bool:
                if report.parent is None:
                    update(report.step, report.total)
                return True

            result = build_engine(
                request.engine,
                work.cache.verified(onnx),
                part,
                targets=request.backend.targets,
                precision=request.precision,
                batch=request.batch,
                profiles=request.profiles,
                settings=request.settings,
                hint=request.hint,
                progress=progress,
                cache=work.cache.root / TENSORRT_CACHE,
            )
        result.save(part)

    work.cache.make(folder, build)
    work.cache.verified(folder / "result.json")
    without_weights = request.settings is not None and request.settings.strip_weights
    return dataclasses.replace(EngineResult.load(folder), weights=onnx if without_weights else None)


def dense_kernels(dense: Path, plan: SlimPlan, request: EngineRequest, work: Workspace) -> dict[str, int]:
    """How many kernels the dense model has in an engine for the first target, by that target; ``plan`` cuts nothing.

    Empty where the engine does not tell, or quantises, which would take a calibration of its own, or where the dense model
    alone cannot be built, which is said: it is for comparison, and the bundle does not need it.
    """
    if request.engine != "trt" or request.graph not in ("fp32", "fp16", "bf16"):
        return {}
    graph = slim_onnx(dense, plan, request, work)[request.names.onnx(request.graph)]
    backend = dataclasses.replace(request.backend, targets=request.backend.targets[:1])
    work.reporter.say("building the dense model as well, to compare its kernels")
    try:
        return built_engine(graph, dataclasses.replace(request, backend=backend), work).kernels
    except (InputRejected, Unavailable) as error:
        work.reporter.say(f"warning: the dense model was not built, so its kernels are not known: {error}")
        return {}


def kept_patches(plan: SlimPlan, layout: Layout, image: Array, model: ModelFacts, work: Workspace) -> Path:
    """The picture of which patches each block keeps of ``image`` (3, h, w), as the model takes it."""
    config = model.data_config
    folder = work.cache.path(
        "picture",
        plan=plan.model_dump(mode="json"),
        layout=layout,
        image=hashlib.sha256(image.tobytes()).hexdigest(),
        config=(config["mean"], config["std"]),
    )

    def build(part: Path) -> None:
        from export.kept_patches import draw_kept_patches

        pixels = image.transpose(1, 2, 0) * np.array(config["std"]) + np.array(config["mean"])
        draw_kept_patches(plan, layout, pixels, part / "kept_patches.png")

    work.cache.make(folder, build)
    return folder / "kept_patches.png"


def onnxruntime_providers(facts: FactStore) -> list[str]:
    """The execution providers that ONNX Runtime has here: what ran on one of them is not what another would answer."""

    def ask() -> list[str]:
        import onnxruntime

        return list(onnxruntime.get_available_providers())

    found = importlib.util.find_spec("onnxruntime")
    files = [] if found is None or found.origin is None else [Path(found.origin)]
    return list(facts.recall("providers", ask, files=files))
