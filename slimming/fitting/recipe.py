"""How a slimmed model is fine-tuned, and what is recorded of it. Free of torch, so that options may read its defaults."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from patchslim.errors import UsageError
from slimming.search.distillation import TrainingPrecision

#: DeiT's learning rate from scratch, for a total batch of 512, and the share of it that fine-tuning takes: 2e-4.
#: That is between what others take for a converged DeiT-S and 30 epochs of ImageNet (EViT 2e-5, DynamicViT 5e-6) and what was
#: best in a short run here: a small ViT on CIFAR-10, 74 % of its MACs cut, one epoch of 3,072 images, 48 steps. There the KL
#: divergence to the original, on 400 test images, fell from .125 to .122, .117, .103, .095 and .090 at 2e-5, 5e-5, 2e-4, 5e-4
#: and 2e-3. That model was in mid-training. A ViT-Ti whose learning rate had come down to nothing was made worse by 1e-4 in 40
#: steps of 32 images (KL .059 to .081), and not by 2.5e-5 (.060): hence the middle, in proportion to the batch.
DEIT_LR, LR_SHARE = 5e-4, 0.4


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; everything that the result depends on but model, teacher and images."""

    epochs: float = 1.0  # passes over the images; may be fractional
    batch_size: int = 64  # images per step and process
    lr: float | None = None  # None: DEIT_LR * LR_SHARE * total batch / 512
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of the steps
    label_smoothing: float = 0.1
    mixup: float = 0.0  # alpha of the beta distribution; 0 is off
    cutmix: float = 0.0  # the same
    hflip: float | None = None  # probability; None: 0.5, and 0 for digits, whose mirror images are no digits
    auto_augment: str | None = None  # timm's, such as rand-m9-mstd0.5-inc1
    ema: float | None = None  # decay per step; None: DeiT's, scaled; 0 is off
    clip_grad: float = 1.0  # norm
    distill: float = 0.5  # weight of the KL divergence to the original's logits; labels have the rest. 0: labels alone
    temperature: float = 1.0  # of both logits in that divergence
    features: float = (
        0.0  # weight of the relative error of the blocks' features, added to all that; the original's are the target
    )
    precision: TrainingPrecision = "no"
    seed: int = 0

    def learning_rate(self, total: int) -> float:
        """Return the highest learning rate for ``total`` images per step, over all processes."""
        return self.lr if self.lr is not None else DEIT_LR * LR_SHARE * total / 512

    def check(self) -> None:
        """Raise ``UsageError`` for the first value that means nothing."""
        rules = {
            "epochs": 0 < self.epochs < math.inf,
            "batch_size": self.batch_size >= 1,
            "lr": self.lr is None or 0 < self.lr < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "warmup": 0 <= self.warmup < 1,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "mixup": 0 <= self.mixup < math.inf,
            "cutmix": 0 <= self.cutmix < math.inf,
            "hflip": self.hflip is None or 0 <= self.hflip <= 1,
            "ema": self.ema is None or 0 <= self.ema < 1,
            "clip_grad": self.clip_grad > 0,
            "distill": 0 <= self.distill <= 1,
            "temperature": 0 < self.temperature < math.inf,
            "features": 0 <= self.features < math.inf,
            "precision": self.precision in ("no", "bf16", "fp16"),
            "seed": self.seed >= 0,
        }
        for name, holds in rules.items():
            if not holds:
                raise UsageError(f"fine-tuning: {name} {getattr(self, name)!r} is out of range")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UsageError(f"fine-tuning: mixup and cutmix mix pairs, and batch_size {self.batch_size} is odd")


@dataclass(frozen=True)
class FinetuneReport:
    """What a plan records of its fine-tuning."""

    epochs: float  # passes that the steps make
    steps: int
    images: int  # seen, over all processes
    loss: float  # mean of about the last 50 steps, the teacher's part included
    lr: float  # the highest
    seconds: float  # of training, those before a resumption included
    fingerprint: str  # SHA-256 over recipe, plan, weights, teacher and images

    def as_dict(self) -> dict[str, float | int | str]:
        """Return the report, ready for JSON."""
        return asdict(self)
