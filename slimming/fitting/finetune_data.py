"""The images of a fine-tuning run as one sequence of draws: shuffled and augmented by seed, so that any part can be redone."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from patchslim.errors import InputRejected
from slimming.data.source import ImageSet, Transform, fingerprint_of, workers_for

_FINGERPRINTED = 256  # images whose bytes are hashed; every index is


def train_transform(data_config: dict[str, Any], *, hflip: float, auto_augment: str | None = None) -> Transform:
    """Return the training transform for a model's ``data_config`` (timm's): PIL image -> float tensor (3, h, w).

    Resized and cropped as in evaluation, so that the subject is where the plan expects it; then moved by up to an eighth of a
    side over a reflected border, and mirrored with probability ``hflip``. Colours are left alone unless ``auto_augment`` says.
    """
    height, width = (int(side) for side in data_config["input_size"][-2:])
    as_evaluated = create_transform(**data_config).transforms
    transform: transforms.Compose = create_transform(
        input_size=(3, height, width),
        is_training=True,
        hflip=hflip,
        color_jitter=None,
        auto_augment=auto_augment,
        interpolation=data_config["interpolation"],
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
    )
    transform.transforms[0] = transforms.Compose(
        [
            *(step for step in as_evaluated if not isinstance(step, (MaybeToTensor, transforms.Normalize))),
            transforms.RandomCrop((height, width), padding=(width // 8, height // 8), padding_mode="reflect"),
        ]
    )
    result: Transform = transform
    return result


class Draws:
    """``count`` draws from ``images``, epoch after epoch without a gap, each epoch in an order of its own.

    Draw i is a function of ``(seed, i)`` alone, whichever worker makes it and whatever was drawn before, so a run that is
    taken up again needs no more than its number of draws. Map-style: draws[i] -> (tensor (3, h, w), class).
    Raises ``InputRejected`` for an image whose class the model does not have; with ``classes`` None nobody looks at it, and it
    is given as 0.
    """

    def __init__(self, images: ImageSet, transform: Transform, *, count: int, classes: int | None, seed: int) -> None:
        self.images, self.transform = images, transform
        self.count, self.classes, self.seed = count, classes, seed
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.count

    def index_of(self, draw: int) -> int:
        """Return which of the data set's images draw number ``draw`` shows."""
        epoch, place = divmod(draw, len(self.images))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, 2, epoch]).permutation(len(self.images))
        return self.images.indices[int(self._order[1][place])]

    def __getitem__(self, draw: int) -> tuple[Tensor, int]:
        index = self.index_of(draw)
        image, target = self.images.samples[index]
        if self.classes is None:
            target = 0
        elif not 0 <= target < self.classes:
            raise InputRejected(f"image {index} is of class {target}, and the model knows {self.classes} classes")
        with seeded(self.seed, 3, draw):
            return self.transform(image), int(target)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's CPU generators by ``key`` for the block, and then put them back."""
    found = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first, second, third = (int(word) for word in np.random.SeedSequence(key).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)
    try:
        yield
    finally:
        random.setstate(found[0])
        np.random.set_state(found[1])
        torch.set_rng_state(found[2])


def loader_of(draws: Draws, batch_size: int, *, cuda: bool) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return the draws in their order, in batches; worker processes decode ahead where there are more than a few batches."""
    # A generator of its own: else each new iterator would take a number from the global one, and a resumed run has one more.
    generator = torch.Generator()
    return DataLoader(
        draws,  # type: ignore[arg-type]
        batch_size,
        drop_last=True,
        num_workers=workers_for(len(draws), batch_size),
        generator=generator,
        pin_memory=cuda,
    )


def read(images: ImageSet, loader: Iterable[Sequence[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the loader's batches. Raises ``InputRejected`` naming an image that cannot be read."""
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # a worker wraps whatever was raised; the cause is in its text
            cause = (str(error).strip() or type(error).__name__).splitlines()[-1].rpartition("InputRejected: ")[2]
            raise InputRejected(f"{images.address}: an image cannot be read: {cause}") from error
        yield batch[0], batch[1]


def identity_of(images: ImageSet) -> dict[str, object]:
    """Return what tells these images from others: address, split, every index, and the bytes of an evenly spread few."""
    spread = [images.indices[place * len(images) // _FINGERPRINTED] for place in range(_FINGERPRINTED)]
    few = replace(images, indices=list(dict.fromkeys(spread)))
    indices = hashlib.sha256(np.asarray(images.indices, dtype=np.int64).tobytes()).hexdigest()
    return {**images.describe(), "indices": indices, "fingerprint": fingerprint_of(few)}
