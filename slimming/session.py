"""From options to a model on a device, its transform and its calibration images: what every door does first."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchslim.choices import Layout
from patchslim.errors import InputRejected, Unavailable
from patchslim.progress import StageProgress
from slimming.options import ModelOptions

if TYPE_CHECKING:
    from slimming.api import FoundPlan, PlanFinder
    from slimming.distributed import ProcessGroup
    from slimming.search.costs import Cost


@dataclass(frozen=True)
class SlimmingSession:
    """A loaded model (``slimming.models.loading.LoadedModel``), its evaluation transform, and its calibration images."""

    loaded: Any
    transform: Any
    calibration: Any


def open_session(options: ModelOptions, evaluated: Any = None, process_group: ProcessGroup | None = None) -> SlimmingSession:
    """Load what the options name; ``evaluated`` is the ``ImageSet`` to be measured on, if any, whose classes are the model's.

    Every process of ``process_group`` has a device of its own.

    Raises ``PatchslimError`` with the next step in its message.
    """
    options.check()
    import torch
    from timm.data import create_transform
    from timm.layers import set_fused_attn

    from slimming.models.loading import load_model, parse_arguments
    from slimming.models.reader import check_supported

    if options.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("--device cuda: PyTorch sees no CUDA device here; pass --device cpu")
    set_fused_attn(True)
    calibration = calibration_images(options)
    classified = calibration if evaluated is None else evaluated
    labels = classified.labels
    if len(labels) == 1:
        raise InputRejected(f"{classified.address}: has one class only, so every answer would be right")
    loaded = load_model(
        options.model,
        weights=options.weights,
        arguments=parse_arguments(options.model_arg),
        preprocessing=options.preprocessing(),
        classes=len(labels) or None,
        seed=options.seed,
    )
    check_supported(loaded.module, options.model)
    classes = int(loaded.module.num_classes)
    if labels and len(labels) != classes:
        raise InputRejected(
            f"{classified.address} has {len(labels)} classes, the model {classes}: "
            "pass data of the model's classes, or --model-arg num_classes=N with weights that fit"
        )
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    if device == "cuda" and process_group is not None and process_group.size > 1:
        device = f"cuda:{torch.cuda.current_device()}"
    loaded.module.to(device)
    return SlimmingSession(loaded, create_transform(**loaded.data_config), calibration)


def calibration_images(options: ModelOptions) -> Any:
    """The images that the plan is made from: an ``ImageSet``, none of it ever evaluated on."""
    from slimming.data.source import calibration_set

    address = options.calibration_data or options.data
    return calibration_set(address, options.calibration_images, options.seed, apart=_apart(address, options.data))


def _apart(address: str, evaluated: str) -> bool:
    """Whether no image of ``address`` can be one that is evaluated on."""
    here, there = Path(address).resolve(), Path(evaluated).resolve()
    return here != there and here not in there.parents and there not in here.parents


def training_images(options: ModelOptions) -> Any:
    """The labelled images to fine-tune on: an ``ImageSet``, none of it ever evaluated on."""
    from slimming.data.digits import DEFAULT_LENGTH
    from slimming.data.source import calibration_set

    address = options.train_data or options.data
    everything = DEFAULT_LENGTH["train"] if address == "digits" else sys.maxsize
    count = everything if options.train_images == "all" else options.train_images
    return calibration_set(address, count, options.seed, apart=_apart(address, options.data))


def open_finder(
    options: ModelOptions, session: SlimmingSession, progress: StageProgress, process_group: ProcessGroup | None = None
) -> PlanFinder:
    """The model's dense features on the calibration images; the caller closes them."""
    from slimming.api import PlanFinder, needs_magnitudes
    from slimming.distributed import SINGLE_PROCESS
    from slimming.models.reader import reader_of

    return PlanFinder(
        session.loaded.module,
        session.calibration,
        name=session.loaded.architecture,
        transform=session.transform,
        mode=options.mode,
        seed=options.seed,
        process_group=process_group or SINGLE_PROCESS,
        progress=progress,
        magnitudes=needs_magnitudes(
            options.score, reader_of(session.loaded.module), options.mode, options.fit, options.budget, options.summary
        ),
    )


def search(
    options: ModelOptions,
    session: SlimmingSession,
    layout: Layout,
    progress: StageProgress,
    *,
    cost: Cost | None = None,
    finder: PlanFinder | None = None,
    checkpoint: Path | None = None,
) -> FoundPlan:
    """Search the plan that the options ask for, fit the weights to it, and fine-tune them where that is asked.

    ``finder`` is reused where one is at hand; ``checkpoint`` is a folder from which an interrupted fine-tuning goes on.
    Raises ``PatchslimError``.
    """
    own = finder or open_finder(options, session, progress)
    try:
        found = own.find_plan(
            options.budget, cost=cost, score=options.score, fit=options.fit, layout=layout, summary=options.summary
        )
    finally:
        if finder is None:
            own.close()
    if not options.finetune_epochs:
        return found
    return _finetuned(options, session, found, progress, checkpoint)


def _finetuned(
    options: ModelOptions, session: SlimmingSession, found: FoundPlan, progress: StageProgress, checkpoint: Path | None
) -> FoundPlan:
    import copy
    import dataclasses

    from slimming.fitting.finetune import finetune
    from slimming.models.slim_vit import SlimViT

    original = session.loaded.module
    model = copy.deepcopy(original) if found.model is original else found.model
    student = SlimViT(model, found.plan).to(next(original.parameters()).device)
    report = finetune(
        student,
        original if options.distill else None,
        training_images(options),
        data_config=session.loaded.data_config,
        recipe=options.recipe,
        checkpoint=checkpoint,
        progress=progress,
    )
    return dataclasses.replace(found, model=model.eval().requires_grad_(False), finetune=report.as_dict())
