"""A tiny fine-tuning: images of one colour per class, a slimmed model and its teacher."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slimming.data.source import ImageSet
from slimming.fitting.finetune import finetune
from slimming.fitting.recipe import Recipe
from slimming.models.slim_vit import SlimViT
from tests.helpers.timm_models import build, random_plan

CLASSES = 7


IMAGES = 40


DATA_CONFIG = {
    "input_size": [3, 48, 48],
    "interpolation": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "crop_pct": 0.9,
    "crop_mode": "center",
}


RECIPE = Recipe(epochs=2.5, batch_size=8, lr=1e-3, mixup=0.4, cutmix=0.5)  # 12 steps, and the second epoch's end inside a batch


class Coloured:
    """Images of one noisy colour per class."""

    def __init__(self, classes: int = CLASSES) -> None:
        self.classes, self.transform = classes, None

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Any, int]:
        rng = np.random.default_rng(index)
        colour = np.random.default_rng(100 + index % self.classes).integers(0, 256, 3)
        pixels = (colour + rng.normal(0, 20, (52, 60, 3))).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
        return (image if self.transform is None else self.transform(image)), index % self.classes


def images(count: int = IMAGES, classes: int = CLASSES) -> ImageSet:
    return ImageSet("coloured", "train", "all", [str(name) for name in range(classes)], Coloured(classes), list(range(count)))


def models(kind: str = "class_token", mode: Any = "compact", **more: Any) -> tuple[SlimViT, Any]:
    """A slimmed model, and the dense original as its teacher."""
    model = build(kind, **more)
    teacher = copy.deepcopy(model)
    return SlimViT(model, random_plan(model, 3, mode)), teacher


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stop_after(step: int) -> Any:
    def progress(stage: str, done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def run(slim: Any, teacher: Any, recipe: Recipe = RECIPE, **options: Any) -> Any:
    given = options.pop("images") if "images" in options else images()
    return finetune(slim, teacher, given, data_config=DATA_CONFIG, recipe=recipe, **options)
