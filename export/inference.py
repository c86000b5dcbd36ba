"""One pass over the held-out images, shared by every stage that has not been measured yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from patchslim.arrays import Array
from patchslim.errors import InputRejected
from patchslim.progress import Progress
from patchslim.runner import BatchLimits, Runner, infer_in_batches
from slimming.data.source import load_tensors

if TYPE_CHECKING:
    from torch import nn

    from slimming.data.source import ImageSet


class TorchRunner:
    """A ``Runner`` of a PyTorch module in eval mode, on the device of its parameters, in float32."""

    batch_limits: BatchLimits = (1, None)

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name, self._module = name, module
        self._device = next(module.parameters()).device

    def infer(self, images: Array) -> Array:
        """Return logits (b, classes) float32 for ``images`` (b, channels, height, width) float32."""
        with torch.inference_mode():
            logits: Array = self._module(torch.from_numpy(images).to(self._device)).float().cpu().numpy()
        return logits


@dataclass(frozen=True)
class Answers:
    """Logits (n, classes) float32 by runner, the images' classes (n,) int64, and the first k images' pixels (k, 3, h, w)."""

    logits: dict[str, Array]
    targets: Array
    inputs: Array

    def check_classes(self, address: str, classes: int) -> None:
        """Raise ``InputRejected`` where an image of the data set ``address`` has a class that the model does not have."""
        if self.targets.min() < 0 or self.targets.max() >= classes:
            raise InputRejected(f"{address}: has class {self.targets.max()}, the model has {classes} classes")


def infer_all(
    runners: Mapping[str, Runner], images: ImageSet, transform: Any, *, batch_size: int, keep: int, progress: Progress
) -> Answers:
    """The answers of all ``runners``, reading and decoding each image once, ``batch_size`` at a time.

    ``transform`` maps a PIL image to the model's input (3, h, w); ``keep`` is how many images' pixels are returned. Raises
    ``InputRejected`` for an image that cannot be read.
    """
    logits: dict[str, list[Array]] = {name: [] for name in runners}
    targets: list[Array] = []
    first: list[Array] = []
    done = 0
    for batch, target in load_tensors(images, transform, batch_size):
        pixels = np.ascontiguousarray(batch.numpy())
        for name, runner in runners.items():
            logits[name].append(infer_in_batches(runner, pixels, batch_size))
        targets.append(target.numpy().astype(np.int64))
        if done < keep:
            first.append(pixels[: keep - done].copy())
        done += len(pixels)
        progress(done, len(images))
    answers = {name: np.concatenate(parts) for name, parts in logits.items()}
    return Answers(answers, np.concatenate(targets), np.concatenate(first))
