"""How a slimmed model learns from the dense one, as far as it is asked for with a plan. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from patchslim.choices import Fit
from patchslim.errors import InputRejected, UsageError

#: Fewer images than this are memorised, not generalised from.
MIN_DISTILL_IMAGES = 64
#: So many are worth it: from 1,024 images a model came 9 % closer in 200 steps, from 256 another one went further away.
WORTH_IMAGES = 1024
#: What ``auto`` spends at most on a CPU, in seconds.
WORTH_SECONDS = 15 * 60
#: Multiply-accumulates per second of training in FP32 on one core of an AMD EPYC with AVX-512 (PyTorch 2.15), and dense passes
#: that a step makes for each image: the dense model's, and of a model of two thirds its size one and its gradients, twice that.
CORE_RATE, PASSES = 30e9, 3
TrainingPrecision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class Distillation:
    """How a slimmed model learns from the dense one on unlabelled images; see ``slimming.fitting.distill``."""

    steps: int = 400
    batch_size: int = 128  # images per step, over all processes
    lr: float = 1e-4  # the highest
    features: float = 5.0  # weight of the blocks' features beside the answers; 0: answers alone
    precision: TrainingPrecision = "no"

    def check(self) -> None:
        """Raise ``UsageError`` for the first value that means nothing."""
        if self.steps < 1:
            raise UsageError(f"--distill-steps {self.steps}: must be at least 1")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"--distill-lr {self.lr}: must be above 0")


@dataclass(frozen=True)
class ChosenFit:
    """What ``--fit auto`` takes, and why."""

    fit: Fit
    reason: str


def chosen_fit(recipe: Distillation, *, macs: int, images: int, on_gpu: bool) -> ChosenFit:
    """Return ``distill`` where it is worth its time, else ``closed-form``; the same on any number of cores and processes.

    ``macs`` are those of the dense model, ``images`` the calibration images.
    """
    if images < WORTH_IMAGES:
        return ChosenFit("closed-form", f"{images} calibration images, and distilling wants {WORTH_IMAGES:,}")
    if on_gpu:
        return ChosenFit("distill", f"{images} calibration images and a GPU")
    seconds = recipe.steps * recipe.batch_size * macs * PASSES / CORE_RATE
    least, most = max(1, round(seconds / 60)), WORTH_SECONDS // 60
    if seconds > WORTH_SECONDS:
        return ChosenFit("closed-form", f"distilling would take a core about {least} minutes, and auto spends {most} at most")
    return ChosenFit("distill", f"{images} calibration images, and about {least} minutes of a core")


def check_distilled(address: str, images: int) -> None:
    """Raise ``InputRejected`` where the calibration images of ``address`` are fewer than a distillation needs."""
    if images < MIN_DISTILL_IMAGES:
        raise InputRejected(
            f"{address}: has {images} calibration images, and --fit distill needs at least {MIN_DISTILL_IMAGES}: "
            "give more of them, or pass --fit closed-form"
        )
