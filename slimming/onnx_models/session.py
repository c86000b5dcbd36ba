"""What ``slimming.run --onnx`` does in place of loading a PyTorch model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchslim.choices import Layout
from patchslim.errors import InputRejected, UsageError
from patchslim.plan import SlimPlan
from patchslim.progress import StageProgress
from slimming.options import ModelOptions
from slimming.session import SlimmingSession, calibration_images

if TYPE_CHECKING:
    from slimming.distributed import ProcessGroup
    from slimming.onnx_models.reader import GraphReader, RuntimeModel
    from slimming.onnx_models.search import GraphPlanFinder

_MODEL = ("model", "weights", "model_arg")


@dataclass(frozen=True)
class LoadedGraph:
    """What is known of a graph: as ``slimming.models.loading.LoadedModel``, as far as a plan needs it."""

    architecture: str
    reader: GraphReader
    module: RuntimeModel
    data_config: dict[str, Any]
    weights: str


def check_options(options: ModelOptions, path: Path) -> None:
    """Raise ``UsageError`` for options that contradict ``--onnx PATH``."""
    for name in _MODEL:
        if getattr(options, name) != getattr(ModelOptions, name):
            raise UsageError(f"--onnx {path} and --{name.replace('_', '-')} contradict each other: the file is the model")
    needs_pytorch = {
        "--fit sgd": options.fit == "sgd",
        "--finetune-epochs": options.finetune_epochs > 0,
        "--summary": options.summary,
    }
    for name, asked in needs_pytorch.items():
        if asked:
            raise UsageError(f"{name} changes weights by PyTorch, and --onnx has no PyTorch model: leave it out")
    if options.budget.criterion in ("latency-reduction", "latency-budget-ms"):
        raise UsageError(
            f"--{options.budget.criterion} is solved on a latency table that export.run measures on its own export, "
            "and there is none for other graphs yet: pass --macs-reduction"
        )
    if options.score == "similarity":
        raise UsageError("--score similarity measures tokens in PyTorch, and --onnx has no PyTorch model: pass --score paper")
    if options.device == "cuda":
        raise UsageError("--onnx runs in ONNX Runtime on the CPU: leave --device out")


def open_graph(options: ModelOptions, path: Path, evaluated: Any = None) -> SlimmingSession:
    """Read the graph at ``path`` and the images that the options name; ``evaluated`` is to be measured on, if anything is.

    Raises ``PatchslimError`` with the next step in its message.
    """
    from timm.data import create_transform, resolve_data_config

    from slimming.onnx_models.reader import GraphReader

    reader = GraphReader(path, options.img_size)
    height, width = reader.graph.image_shape
    if options.img_size is not None and (height, width) != (options.img_size, options.img_size):
        raise UsageError(f"--img-size {options.img_size}: {path} takes images of {height} x {width}: leave --img-size out")
    labels = [] if evaluated is None else evaluated.labels
    if len(labels) == 1:
        raise InputRejected(f"{evaluated.address}: has one class only, so every answer would be right")
    if labels and reader.classes is not None and len(labels) != reader.classes:
        found = f"{evaluated.address} has {len(labels)} classes, {path} gives {reader.classes} answers"
        raise InputRejected(f"{found}: pass data of its classes, or leave --eval-images and --sweep out")
    # The part of timm that resizes and normalises; what is not said is ImageNet's.
    overrides = {key: value for key, value in options.preprocessing().items() if value is not None and key != "img_size"}
    config = resolve_data_config(args=overrides | {"input_size": (3, height, width)}, pretrained_cfg={})
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.stem)
    loaded = LoadedGraph(name, reader, reader.model, config, path.name)
    return SlimmingSession(loaded, create_transform(**config), calibration_images(options))


def described(config: dict[str, Any]) -> str:
    """The preprocessing in words."""
    _, height, width = config["input_size"]
    means, deviations = (", ".join(f"{value:g}" for value in config[key]) for key in ("mean", "std"))
    return (
        f"images of {height} x {width}, {config['interpolation']}, crop {config['crop_pct']:g}, mean {means}, std {deviations} "
        "(ImageNet's where --interpolation, --crop-pct, --mean and --std say nothing)"
    )


def open_graph_finder(
    options: ModelOptions, session: SlimmingSession, progress: StageProgress, process_group: ProcessGroup
) -> GraphPlanFinder:
    """The graph's dense features on the calibration images; the caller closes them."""
    from slimming.onnx_models.search import GraphPlanFinder

    return GraphPlanFinder(
        session.loaded.reader,
        session.calibration,
        name=session.loaded.architecture,
        transform=session.transform,
        mode=options.mode,
        seed=options.seed,
        process_group=process_group,
        progress=progress,
        magnitudes=options.score in ("auto", "paper", "uniform"),
    )


def slimmed(session: SlimmingSession, plan: SlimPlan, layout: Layout) -> RuntimeModel:
    """The session's graph cut to ``plan``, in ONNX Runtime."""
    from slimming.onnx_models.search import slim_model

    return slim_model(session.loaded.reader, plan, layout)
