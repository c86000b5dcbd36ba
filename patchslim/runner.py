"""``Runner``: what answers images with logits, whatever runs underneath."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected

#: Fewest and most images that one call takes; None: as many as memory holds.
BatchLimits = tuple[int, int | None]


class TensorInfo(NamedTuple):
    """An input or output of a model: ``type`` in ONNX Runtime's words; an axis of free length is ``'batch'``."""

    name: str
    type: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.type} [{', '.join(map(str, self.shape))}]"


class ImageInput(NamedTuple):
    """The input of an image classifier; ``image_shape`` is (channels, height, width)."""

    batch_limits: BatchLimits
    image_shape: tuple[int, int, int]


class Runner(Protocol):
    """An image classifier that is ready to run: PyTorch, ONNX Runtime, TensorRT, OpenVINO."""

    @property
    def name(self) -> str:
        """What messages call it: the file, or the stage of an export."""

    @property
    def batch_limits(self) -> BatchLimits:
        """How many images one call of ``infer`` takes."""

    def infer(self, images: Array) -> Array:
        """Return logits (b, classes) float32 for ``images`` (b, channels, height, width), b within ``batch_limits``.

        Raises ``InputRejected``, naming the runner, for images that it cannot take.
        """


def infer_in_batches(runner: Runner, images: Array, batch: int = 8) -> Array:
    """Return logits (n, classes) float32 for any number n >= 1 of ``images`` (n, channels, height, width).

    ``batch`` images go into each call, as far as the runner's limits allow; a last batch that is smaller than its fewest is
    filled up by repeating the last image. Raises ``InputRejected`` as ``Runner.infer`` does.
    """
    fewest, most = runner.batch_limits
    size = max(fewest, batch if most is None else min(batch, most))
    parts = []
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        missing = fewest - len(chunk)
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)]) if missing > 0 else chunk
        parts.append(runner.infer(filled)[: len(chunk)])
    return np.concatenate(parts)


def ensure_logits(logits: Array, images: Array, name: str) -> None:
    """Raise ``InputRejected``, naming the runner, unless ``logits`` are (b, classes) for ``images`` (b, ...)."""
    if logits.ndim != 2 or len(logits) != len(images):
        raise InputRejected(f"{name}: answers with shape {logits.shape} for {len(images)} images, not (images, classes)")


def image_input(inputs: Sequence[TensorInfo], types: Collection[str], name: str) -> ImageInput:
    """The one input of the image classifier ``name``: of one of ``types``, (batch, channels, height, width), only batch free.

    Raises ``InputRejected`` where ``inputs`` are anything else.
    """
    first = inputs[0] if len(inputs) == 1 else None
    sizes = [] if first is None else [axis for axis in first.shape[1:] if isinstance(axis, int)]
    if first is None or first.type not in types or len(first.shape) != 4 or len(sizes) != 3:
        found = "; ".join(map(str, inputs)) or "none"
        wanted = "one floating-point input (batch, channels, height, width), only batch free"
        raise InputRejected(f"{name}: expected {wanted}; found {found}")
    batch = first.shape[0]
    return ImageInput((batch, batch) if isinstance(batch, int) else (1, None), (sizes[0], sizes[1], sizes[2]))
