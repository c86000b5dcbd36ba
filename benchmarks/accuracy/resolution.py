"""The same weights on smaller images: what users compare slimming with."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

from patchslim.macs import macs_of
from slimming.models.reader import reader_of

if TYPE_CHECKING:
    from benchmarks.accuracy.bench import Bench


class AtResolution(nn.Module):
    """A model at another resolution, for the same images."""

    def __init__(self, inner: Any, side: int) -> None:
        super().__init__()
        self.model, self.side = inner, side
        self.num_classes = inner.num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) -> logits (b, classes)."""
        result: Tensor = self.model(functional.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True))
        return result


def at_resolution(model: Any, side: int) -> nn.Module:
    """The model behind a resize of its images to ``side`` pixels, its position embedding resampled as timm does it."""
    inner = copy.deepcopy(model)
    inner.set_input_size(img_size=(side, side))
    return AtResolution(inner, side).to(next(model.parameters()).device)


def macs_at(bench: Bench, side: int) -> int:
    """Multiply-accumulates of the dense model on images of ``side`` pixels."""
    inner = copy.deepcopy(bench.model)
    inner.set_input_size(img_size=(side, side))  # type: ignore[operator]
    reader = reader_of(inner, bench.options.model)
    return macs_of([reader.tokens] * len(reader.blocks), reader.tokens, reader.geometry())
