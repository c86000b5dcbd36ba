"""One pass over the held-out images, shared by every stage that has not been measured yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected

#: (b, 3, h, w) float32 images -> (b, classes) float32 logits.
Runner = Callable[[Array], Array]


def torch_runner(module: Any) -> Runner:
    """Run a PyTorch module on the device of its parameters, in float32."""
    import torch

    device = next(module.parameters()).device

    def run(images: Array) -> Array:
        with torch.inference_mode():
            logits: Array = module(torch.from_numpy(images).to(device)).float().cpu().numpy()
        return logits

    return run


def measure(
    runners: dict[str, Runner],
    images: Any,
    transform: Any,
    *,
    batch_size: int,
    classes: int,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Array], Array]:
    """Logits (n, classes) of every stage, and the images' classes (n,), reading and decoding each image once.

    ``images`` is a ``slimming.data.ImageSet``. Raises ``InputRejected`` for an image that cannot be read or a class that the
    model does not have.
    """
    from slimming.data.source import load_tensors

    logits: dict[str, list[Array]] = {stage: [] for stage in runners}
    targets: list[Array] = []
    done = 0
    for batch, target in load_tensors(images, transform, batch_size):
        pixels = np.ascontiguousarray(batch.numpy())
        for stage, run in runners.items():
            logits[stage].append(np.asarray(run(pixels), dtype=np.float32))
        targets.append(target.numpy().astype(np.int64))
        done += len(pixels)
        progress(done, len(images))
    classes_seen = np.concatenate(targets)
    if classes_seen.min() < 0 or classes_seen.max() >= classes:
        raise InputRejected(f"{images.address}: has class {classes_seen.max()}, the model has {classes} classes")
    return {stage: np.concatenate(parts) for stage, parts in logits.items()}, classes_seen
