"""How a slimmed model learns from the dense one, as far as it is asked for with a plan. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchslim.errors import InputRejected, UsageError

#: Fewer images than this are memorised, not generalised from.
MIN_DISTILL_IMAGES = 64
TrainingPrecision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class Distillation:
    """How a slimmed model learns the dense one's answers on unlabelled images; see ``slimming.fitting.distill``."""

    steps: int = 400
    batch_size: int = 128  # images per step, over all processes
    lr: float = 1e-4  # the highest
    precision: TrainingPrecision = "no"

    def check(self) -> None:
        """Raise ``UsageError`` for the first value that means nothing."""
        if self.steps < 1:
            raise UsageError(f"--distill-steps {self.steps}: must be at least 1")


def check_distilled(address: str, images: int) -> None:
    """Raise ``InputRejected`` where the calibration images of ``address`` are fewer than a distillation needs."""
    if images < MIN_DISTILL_IMAGES:
        raise InputRejected(
            f"{address}: has {images} calibration images, and --fit distill needs at least {MIN_DISTILL_IMAGES}: "
            "give more of them, or pass --fit closed-form"
        )
