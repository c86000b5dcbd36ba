"""The same weights on smaller images: what users compare slimming with."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from patchslim.macs import macs_of
from slimming.models.reader import reader_of


class AtResolution(nn.Module):
    """A model at another resolution, for the same images."""

    def __init__(self, inner: Any, side: int) -> None:
        super().__init__()
        self.model, self.side = inner, side
        self.num_classes = inner.num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) -> logits (b, classes)."""
        result: Tensor = self.model(resized(images, self.side))
        return result


def resized(images: Tensor, side: int) -> Tensor:
    """Images (b, 3, h, w), already normalised, at ``side`` pixels: (b, 3, side, side)."""
    return functional.interpolate(images, (side, side), mode="bicubic", antialias=True)


def resampled(model: Any, side: int) -> nn.Module:
    """A copy of the model for images of ``side`` pixels, its position embedding resampled as timm does it."""
    inner: nn.Module = copy.deepcopy(model)
    inner.set_input_size(img_size=(side, side))  # type: ignore[operator]
    return inner


def at_resolution(model: Any, side: int) -> nn.Module:
    """The model behind a resize of its images to ``side`` pixels."""
    return AtResolution(resampled(model, side), side).to(next(model.parameters()).device)


def dense_macs(model: nn.Module, name: str) -> int:
    """Multiply-accumulates of a dense model."""
    reader = reader_of(model, name)
    return macs_of([reader.tokens] * len(reader.blocks), reader.tokens, reader.geometry())


def macs_by_side(model: Any, name: str) -> dict[int, int]:
    """Multiply-accumulates of the dense model for each smaller side of its images that holds whole patches."""
    patch, whole = int(model.patch_embed.patch_size[0]), int(model.patch_embed.img_size[0])
    return {side: dense_macs(resampled(model, side), name) for side in range(patch, whole, patch)}
