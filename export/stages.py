"""The stages of an export, each cached under everything that went into it: plan, dense ONNX, slim ONNX, engine, logits."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.cache import StageCache
from export.engines.base import BuildProgress, EngineResult
from export.engines.build import build_engine
from export.inference import Runner, measure, torch_runner
from export.onnx_export import export_dense
from export.options import ExportOptions
from patchslim.arrays import Array
from patchslim.errors import InputRejected
from patchslim.plan import SlimPlan, load_plan
from patchslim.progress import Reporter
from slimming.search.budget import LATENCY
from slimming.session import SlimmingSession, search
from validate.bundle import digest

PYTORCH, PYTORCH_SLIM, ONNX_SLIM, ONNX_FP16, ENGINE = "pytorch", "pytorch-slim", "onnx-slim", "onnx-slim-fp16", "engine"


@dataclass(frozen=True)
class Stages:
    """What the stages of one run share."""

    options: ExportOptions
    session: SlimmingSession
    cache: StageCache
    reporter: Reporter

    @property
    def model_key(self) -> dict[str, object]:
        """Everything that decides the original's answers."""
        loaded = self.session.loaded
        return {
            "architecture": loaded.architecture,
            "arguments": loaded.arguments,
            "weights": loaded.weights_sha256,
            "preprocessing": loaded.data_config,
        }

    def plan_folder(self) -> Path:
        """Where the found plan is, or will be."""
        from slimming.data.source import fingerprint_of

        options = self.options
        return self.cache.path(
            "plan",
            model=self.model_key,
            images=fingerprint_of(self.session.calibration),
            described=self.session.calibration.describe(),
            budget=dataclasses.asdict(options.budget),
            form=(options.mode, options.layout, options.seed, self.device, options.score, options.fit, options.summary),
            latency=digest(self.latency_table()) if options.budget.criterion in LATENCY else None,
            finetune=self._finetune_key(),
        )

    def _finetune_key(self) -> object:
        """What fine-tuning depends on beyond the plan; None without it."""
        from slimming.session import training_images

        if not self.options.finetune_epochs:
            return None
        return dataclasses.asdict(self.options.recipe), training_images(self.options).describe()

    def latency_table(self) -> Path:
        """The latency table that a latency budget is solved on: the given one, or measured once on the dense graph."""
        from patchslim.latency_table import load_table
        from slimming.api import dense_plan

        options, loaded = self.options, self.session.loaded
        plan = dense_plan(loaded.module, loaded.architecture).model_copy(update={"mode": options.mode})
        merged = options.merges(fixed_head=bool(plan.head_tokens))
        if options.latency_table is not None:
            load_table(options.latency_table).ensure_fits(plan, options.layout, merged)
            return options.latency_table
        dense = self.dense_onnx(loaded.module)
        folder = self.cache.path(
            "latency",
            dense=digest(dense),
            form=(options.mode, options.layout, merged, options.engine, options.engine_precision, options.batch_size),
            machine=(platform.node(), platform.processor(), os.cpu_count(), onnxruntime_providers()),
        )

        def build(part: Path) -> None:
            from export.latency.measure import measure_table

            with self.reporter.stages("points") as progress:
                measure_table(
                    dense,
                    plan,
                    layout=options.layout,
                    mode=options.mode,
                    merged=merged,
                    engine=options.engine,
                    precision=options.engine_precision,
                    batch=options.batch_size,
                    progress=progress,
                ).save(part / "latency_table.json")

        self.cache.make(folder, build)
        return folder / "latency_table.json"

    @property
    def device(self) -> str:
        """PyTorch's device type."""
        return str(next(self.session.loaded.module.parameters()).device.type)

    def plan(self) -> SlimPlan:
        """The given plan, the dense one, or the one that the search finds."""
        from slimming.api import dense_plan
        from slimming.models.slim_vit import check_fits

        options, loaded = self.options, self.session.loaded
        if options.dense:
            return dense_plan(loaded.module, loaded.architecture)
        if options.plan is not None:
            plan = load_plan(options.plan)
            check_fits(loaded.module, plan)
            if plan.model != loaded.architecture:  # the manifest names one model
                raise InputRejected(f"{options.plan}: was made for {plan.model}, and --model is {loaded.architecture}")
            return plan
        folder = self.plan_folder()

        def build(part: Path) -> None:
            from patchslim.latency_table import load_table
            from slimming.fitting.fitted_weights import save_fitted

            cost = load_table(self.latency_table()) if options.budget.criterion in LATENCY else None
            checkpoint = folder.with_name(f"{folder.name}.checkpoint")
            with self.reporter.stages() as progress:
                found = search(options, self.session, options.layout, progress, cost=cost, checkpoint=checkpoint)
            if found.fit != options.fit:
                self.reporter.say("the blocks end in norms, so they cannot be refitted in closed form: --fit none")
            save_fitted(found.plan, found.model, part / "plan.json", found.fit, found.finetune)
            shutil.rmtree(checkpoint, ignore_errors=True)

        self.cache.make(folder, build)
        return load_plan(folder / "plan.json")

    def fitted(self, plan: SlimPlan) -> Any:
        """The PyTorch module that runs under ``plan``: the original, or a copy with the weights that were fitted to the cut."""
        from slimming.fitting.fitted_weights import load_fitted

        if plan.weights is None:
            return self.session.loaded.module
        path = self.options.plan or self.plan_folder() / "plan.json"
        return load_fitted(plan, path, self.session.loaded.module)

    def dense_onnx(self, module: Any) -> Path:
        """``module``, the original or its fitted copy, exported dense."""
        from slimming.models.loading import state_digest

        key = self.model_key | {"weights": state_digest(module.state_dict())}
        folder = self.cache.path("dense", model=key)

        def build(part: Path) -> None:
            self.reporter.say("exporting the dense model to ONNX")
            export_dense(module, tuple(self.session.loaded.data_config["input_size"]), part / "dense.onnx")

        self.cache.make(folder, build)
        return folder / "dense.onnx"

    def slim_onnx(self, dense: Path, plan: SlimPlan) -> dict[str, Path]:
        """The slim model by stage name: float32, and typed FP16 where the engine asks for it."""
        layout, precision = self.options.layout, self.options.engine_precision
        folder = self.cache.path(
            "slim", dense=digest(dense), plan=plan.model_dump(mode="json"), layout=layout, precision=precision
        )

        def build(part: Path) -> None:
            from graph_passes import load_model, save_model, slim, to_fp16

            self.reporter.say(f"cutting tokens out of the graph ({layout} qkv)")
            result = slim(load_model(dense), plan, layout=layout)
            save_model(result.model, part / "model.onnx")
            if precision == "fp16":
                save_model(to_fp16(result.model), part / "model.fp16.onnx")

        self.cache.make(folder, build)
        files = {ONNX_SLIM: folder / "model.onnx"}
        if precision == "fp16":
            files[ONNX_FP16] = folder / "model.fp16.onnx"
        return files

    def engine(self, onnx: Path) -> EngineResult:
        """The engine for the target, built from ``onnx``."""
        options = self.options
        backend: dict[str, object] = {"engine": options.engine, "providers": onnxruntime_providers()}
        if options.engine == "trt":
            from export.engines.tensorrt_build import choose_backend

            backend |= dataclasses.asdict(choose_backend(options.targets))
        folder = self.cache.path("engine", onnx=digest(onnx), precision=options.engine_precision, **backend)

        def build(part: Path) -> None:
            with self.reporter.bar("building engines", unit="") as update:

                def progress(report: BuildProgress) -> bool:
                    if report.parent is None:
                        update(report.step, report.total)
                    return True

                result = build_engine(
                    options.engine, onnx, part, targets=options.targets, precision=options.engine_precision, progress=progress
                )
            fields = dataclasses.asdict(result)
            fields["files"] = [file.name for file in result.files if options.engine == "trt"]
            fields["layers_file"] = result.layers_file.name if result.layers_file else None
            (part / "result.json").write_text(json.dumps(fields), encoding="utf-8")

        self.cache.make(folder, build)
        fields = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        fields["files"] = [folder / name for name in fields["files"]]
        fields["layers_file"] = folder / fields["layers_file"] if fields["layers_file"] else None
        fields["batch"] = tuple(fields["batch"])
        return EngineResult(**fields)

    def logits(
        self, images: Any, plan: SlimPlan, fitted: Any, graphs: dict[str, Path], engine: EngineResult
    ) -> tuple[dict[str, Array], Array]:
        """Logits of every stage on the held-out images, and their classes; only what is not there yet is run.

        A TensorRT engine is a stage of its own where it can run here.
        """
        from slimming.data.source import fingerprint_of

        fingerprint = fingerprint_of(images)
        if self.options.engine == "trt" and engine.executed:
            graphs = {**graphs, ENGINE: engine.files[0]}
        keys: dict[str, object] = {
            PYTORCH: "original",
            PYTORCH_SLIM: plan.model_dump(mode="json", include={"kept", "mode", "merged_into", "weights"}),
        }
        keys |= {stage: digest(path) for stage, path in graphs.items()}
        where = (self.device, onnxruntime_providers())
        shared = {"images": fingerprint, "model": self.model_key, "device": where}
        folders = {stage: self.cache.path("logits", stage=stage, key=key, **shared) for stage, key in keys.items()}
        missing = [stage for stage, folder in folders.items() if not folder.is_dir()]
        if missing:
            runners = {stage: self._runner(stage, plan, fitted, graphs, engine) for stage in missing}
            classes = int(self.session.loaded.module.num_classes)
            self.reporter.say(f"measuring {', '.join(missing)} on {len(images)} held-out images")
            with self.reporter.bar("parity") as progress:
                found, targets = measure(
                    runners,
                    images,
                    self.session.transform,
                    batch_size=self.options.batch_size,
                    classes=classes,
                    progress=progress,
                )
            for stage, logits in found.items():

                def build(part: Path, logits: Array = logits, targets: Array = targets) -> None:
                    np.save(part / "logits.npy", logits)
                    np.save(part / "targets.npy", targets)

                self.cache.make(folders[stage], build)
        read = {stage: np.load(folder / "logits.npy", allow_pickle=False) for stage, folder in folders.items()}
        return read, np.load(folders[PYTORCH] / "targets.npy", allow_pickle=False)

    def _runner(self, stage: str, plan: SlimPlan, fitted: Any, graphs: dict[str, Path], engine: EngineResult) -> Runner:
        from export.engines.onnx_runtime import open_runner
        from slimming.models.slim_vit import SlimViT

        module = self.session.loaded.module
        if stage == PYTORCH:
            return torch_runner(module)
        if stage == PYTORCH_SLIM:
            return torch_runner(SlimViT(fitted, plan).to(self.device).eval())
        if stage == ENGINE:
            from export.engines.tensorrt_runner import TrtSession

            return TrtSession(graphs[stage], engine.backend).run
        return open_runner(graphs[stage]).infer


def onnxruntime_providers() -> list[str]:
    """The execution providers that ONNX Runtime has here: what ran on one of them is not what another would answer."""
    import onnxruntime

    return list(onnxruntime.get_available_providers())
