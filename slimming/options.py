"""Options that every door shares that takes a model and images: the one source of their names, defaults and help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from slimming.door import UsageError
from slimming.plan import Mode


@dataclass(frozen=True)
class ModelOptions:
    """The model, its weights and the images that a plan is made from."""

    model: str = "vit_ti"
    """A preset (vit_ti vit_s vit_b deit_ti deit_s deit_b) or any timm model name."""
    model_arg: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Passed on to timm.create_model; may be given several times."""
    weights: str = "bundled"
    """bundled, pretrained (from timm's hub: the only option that uses the network), random, or a safetensors or .pth file."""
    img_size: int | None = None
    """Image side in pixels, where it is not the model's own."""
    mean: tuple[float, ...] = ()
    """Channel means of pixels in [0, 1], where they are not the model's own."""
    std: tuple[float, ...] = ()
    """Channel standard deviations of pixels in [0, 1], where they are not the model's own."""
    crop_pct: float | None = None
    """Share of the resized image's side that the centre crop keeps, where it is not the model's own."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None
    """How images are resized, where it is not the model's own way."""
    data: str = "digits"
    """Images: digits (built in), a folder, FILE.tar, hfds/NAME or wds/PATH, as timm reads them."""
    calibration_data: str | None = None
    """Images that the plan is made from, in the same forms; by default the train split of --data, or a fifth kept apart."""
    calibration_images: int = 256
    """How many of them."""
    macs_reduction: float = 0.45
    """Fraction of the model's multiply-accumulates to remove."""
    tolerance: float | None = None
    """Instead of --macs-reduction: the relative error that each cut may cause in the block above (the paper: 0.01, 0.02)."""
    mode: Mode = "compact"
    """What later blocks see of a dropped token: nothing (compact), or its last value (stale)."""
    seed: int = 0
    """Draws the calibration images and random weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where PyTorch runs; auto takes a GPU when there is one."""

    def preprocessing(self) -> dict[str, Any]:
        """The overrides of the model's data config, by timm's names."""
        return {
            "img_size": self.img_size,
            "mean": self.mean or None,
            "std": self.std or None,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
        }

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if self.calibration_images < 1:
            raise UsageError(f"--calibration-images {self.calibration_images}: must be at least 1")
        if not 0 <= self.macs_reduction < 1:
            raise UsageError(f"--macs-reduction {self.macs_reduction}: must be a fraction from 0 to below 1")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise UsageError(f"--tolerance {self.tolerance}: must be a number from 0")
        if self.img_size is not None and self.img_size < 1:
            raise UsageError(f"--img-size {self.img_size}: must be at least 1")
        if any(len(values) not in (0, 1, 3) for values in (self.mean, self.std)):
            raise UsageError("--mean and --std take one value, or one per channel")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise UsageError("--mean and --std must be finite")
        if any(value <= 0 for value in self.std):
            raise UsageError("--std must be above 0")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 4:
            raise UsageError(f"--crop-pct {self.crop_pct}: must be a share above 0, at most 4")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}: must be from 0 to below 2^63")
        if not self.data or self.calibration_data == "":
            raise UsageError("--data and --calibration-data must not be empty")
