"""The built-in data set ``digits``: real handwritten digits on real photographs, from scikit-learn's wheel alone.

Each image is one of scikit-learn's 1,797 handwritten digits (UCI ML, 8 x 8 grey) drawn at a random place (centre-biased),
size, angle, contrast and colour on a random crop of one of scikit-learn's two sample photographs. An image is a function of
``(split, index)`` and of nothing else, so every split can have any number of images and every machine sees the same ones.
Every fifth handwritten digit belongs to the test split and is never drawn in the train split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

SIZE = 224
CLASSES = tuple("0123456789")
SPLITS = ("train", "test")
#: Images a split has when no number is asked for; any index beyond it is just as valid.
DEFAULT_LENGTH = {"train": 50_000, "test": 10_000}

_GLYPH_SIDE = (88, 144)  # side of the digit's square with one empty cell all round, 10 x 10, pixels
_OFFSET_SIGMA, _OFFSET_MAX = 14.0, 40.0  # of the digit's centre from the image's, pixels
_CROP_SIDE = (140, 400)  # side of the photograph's crop, pixels, before it is resized to SIZE
_BRIGHTNESS = (0.3, 0.6)  # of the photograph, so that a brighter colour is left for the digit
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@functools.cache
def _sources() -> tuple[np.ndarray, np.ndarray, list[Image.Image]]:
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    glyphs = np.pad((digits.images * (255 / 16)).round().astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    return glyphs, digits.target.astype(int), photographs


def source_indices(split: str) -> np.ndarray:
    """Return indices into scikit-learn's digits that ``split`` may draw: every fifth is ``test``'s, the others ``train``'s."""
    if split not in SPLITS:
        raise ValueError(f"digits has the splits {', '.join(SPLITS)}, not {split!r}")
    everything = np.arange(len(_sources()[0]))
    is_test = everything % 5 == 4
    chosen: np.ndarray = everything[is_test if split == "test" else ~is_test]
    return chosen


def _background(rng: np.random.Generator, photographs: list[Image.Image]) -> np.ndarray:
    photograph = photographs[rng.integers(len(photographs))]
    side = rng.uniform(*_CROP_SIDE)
    left = rng.uniform(0, photograph.width - side)
    top = rng.uniform(0, photograph.height - side)
    box = (left, top, left + side, top + side)
    crop = photograph.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop, dtype=np.float32) * (rng.uniform(*_BRIGHTNESS) / 255)


def _colour(rng: np.random.Generator, local_luma: float) -> np.ndarray:
    """A random colour, mixed with white until its luma is 0.3 to 0.4 above the surroundings', so that the digit can be seen."""
    colour = rng.random(3, dtype=np.float32)
    luma, wanted = float(colour @ _LUMA), local_luma + rng.uniform(0.3, 0.4)
    white = max(0.0, (wanted - luma) / (1 - luma))
    return colour + np.float32(white) * (1 - colour)


def render(split: str, index: int) -> tuple[Image.Image, int, tuple[int, int]]:
    """Draw image ``index`` of ``split``.

    Returns the 224 x 224 RGB image, its class (0 to 9) and the digit's centre ``(x, y)`` in pixels.
    Raises ``ValueError`` for an unknown split or a negative index.
    """
    if index < 0:
        raise ValueError(f"digits has no image {index}")
    pool = source_indices(split)
    glyphs, targets, photographs = _sources()
    source = pool[index % len(pool)]
    rng = np.random.default_rng([20221, SPLITS.index(split), index])
    canvas = _background(rng, photographs)

    side = int(rng.integers(_GLYPH_SIDE[0], _GLYPH_SIDE[1] + 1))
    glyph = Image.fromarray(glyphs[source]).resize((side, side), Image.Resampling.BICUBIC)
    glyph = glyph.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    offset = np.clip(rng.normal(0, _OFFSET_SIGMA, 2), -_OFFSET_MAX, _OFFSET_MAX)
    left, top = (np.round(SIZE / 2 + offset - side / 2)).astype(int)  # always inside: 112 - 40 - 72 = 0
    window = canvas[top : top + side, left : left + side]
    alpha = np.asarray(glyph, dtype=np.float32)[..., None] / 255 * rng.uniform(0.65, 1.0)
    colour = _colour(rng, float((window @ _LUMA).mean()))
    window += alpha * (colour - window)
    image = Image.fromarray((canvas.clip(0, 1) * 255).round().astype(np.uint8))
    return image, int(targets[source]), (int(left + side // 2), int(top + side // 2))


class Digits:
    """A map-style data set of ``length`` images of ``split``; ``transform`` is applied to each PIL image, as timm expects."""

    classes = CLASSES

    def __init__(self, split: str, length: int | None = None, transform: Callable[[Image.Image], Any] | None = None) -> None:
        source_indices(split)  # refuses an unknown split now
        self.split = split
        self.length = DEFAULT_LENGTH[split] if length is None else length
        self.transform = transform

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        image, target, _ = render(self.split, index)
        return (image if self.transform is None else self.transform(image)), target
