"""From options to a model on a device, its transform and its calibration images: what every door does first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimming.door import InputRejected, Unavailable
from slimming.options import ModelOptions
from slimming.plan import Layout, SlimPlan

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Session:
    """A loaded model (``slimming.models.LoadedModel``), its evaluation transform, and its calibration images."""

    loaded: Any
    transform: Any
    calibration: Any


def open_session(options: ModelOptions, evaluated: Any = None) -> Session:
    """Load what the options name; ``evaluated`` is the ``ImageSet`` to be measured on, if any, whose classes are the model's.

    Raises ``DoorError`` with the next step in its message.
    """
    options.check()
    import torch
    from timm.data import create_transform
    from timm.layers import set_fused_attn

    from slimming.data import calibration_set
    from slimming.families import check_supported
    from slimming.models import load_model, parse_arguments

    if options.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("--device cuda: PyTorch sees no CUDA device here; pass --device cpu")
    set_fused_attn(True)
    address = options.calibration_data or options.data
    here, there = Path(address).resolve(), Path(options.data).resolve()
    apart = here != there and here not in there.parents and there not in here.parents
    calibration = calibration_set(address, options.calibration_images, options.seed, apart=apart)
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
    loaded.module.to(device)
    return Session(loaded, create_transform(**loaded.data_config), calibration)


def search(options: ModelOptions, session: Session, layout: Layout, progress: Progress, cost: Cost | None = None) -> Found:
    """Search the plan that the options ask for, and fit the weights to it; see ``slimming.api.find``."""
    from slimming.api import find

    return find(
        session.loaded.module,
        session.calibration,
        name=session.loaded.architecture,
        transform=session.transform,
        budget=options.budget,
        cost=cost,
        score=options.score,
        fit=options.fit,
        mode=options.mode,
        layout=layout,
        seed=options.seed,
        progress=progress,
    )
