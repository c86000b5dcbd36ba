"""Training images that stay on the GPU: drawn, moved, mirrored, mixed and enlarged there, so that no loader is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.training.train_cifar10 import MEAN, STD, augment, enlarged, mix, moved


@dataclass(frozen=True)
class ResidentImages:
    """Small images (n, 3, h, w), uint8, and their classes (n,) on one device; batches of them at ``size`` pixels a side.

    Called as ``slimming.fitting.finetune`` calls its feed. Batch ``step`` is a function of ``(seed, step)`` alone. With
    ``labelled`` the images are augmented as the dense model's training did it (``benchmarks.training.train_cifar10``): cropped
    from a reflected border, mirrored, coloured, every other batch cut and pasted (CutMix). Without, they are moved, mirrored
    and blended pairwise (mixup, alpha 1), and the classes given are zeros: nobody looks at them.
    """

    images: Tensor
    targets: Tensor
    size: int
    batch_size: int
    seed: int = 0
    labelled: bool = True

    def __call__(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of steps ``start`` to ``stop``: float (b, 3, size, size), normalised, and targets."""
        for step in range(start, stop):
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            rows = moved(torch.randint(len(self.images), (self.batch_size,), generator=rng), self.images.device)
            if self.labelled:
                pixels, targets = mix(augment(self.images[rows], rng), self.targets[rows], rng)
            else:
                pixels, targets = blended(shifted(self.images[rows], rng), rng), torch.zeros_like(self.targets[rows])
            yield enlarged(pixels, self.size), targets


def shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    """Images (b, 3, h, w), uint8, moved by up to an eighth of their side over a reflected border and mirrored: normalised."""
    count, device, side = len(images), images.device, images.shape[-1]
    border = side // 8
    padded = functional.pad(images.float() / 255, (border,) * 4, mode="reflect")
    corner = moved(torch.randint(0, 2 * border + 1, (2, count), generator=rng), device)
    mirrored = moved(torch.rand(count, generator=rng), device) < 0.5
    span = torch.arange(side, device=device)
    rows, columns = corner[0][:, None] + span, corner[1][:, None] + span
    columns = torch.where(mirrored[:, None], columns.flip(-1), columns)
    image, channel = torch.arange(count, device=device), torch.arange(3, device=device)
    cut = padded[image[:, None, None, None], channel[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]
    mean, std = (moved(torch.tensor(values), device)[None, :, None, None] for values in (MEAN, STD))
    return (cut - mean) / std


def blended(images: Tensor, rng: torch.Generator) -> Tensor:
    """Every image mixed with another one of its batch, by a share that is uniform from 0 to 1 (mixup with alpha 1)."""
    share = moved(torch.rand(len(images), 1, 1, 1, generator=rng), images.device)
    return share * images + (1 - share) * images[moved(torch.randperm(len(images), generator=rng), images.device)]
