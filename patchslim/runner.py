"""``Runner``: what answers images with logits, whatever runs underneath."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected

#: Fewest and most images that one call takes; None: as many as memory holds.
BatchLimits = tuple[int, int | None]


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
