"""Images from a folder, preprocessed as the manifest says: timm's evaluation transform in Pillow and NumPy alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected
from patchslim.images import IMAGE_SUFFIXES, read_image, scan_class_folders
from validate.manifest import Manifest, Preprocessing

if TYPE_CHECKING:
    from PIL import Image

_MAX_PIXELS = 1 << 26  # of a resized image: thin ones grow without bound


def preprocess(image: Image.Image, spec: Preprocessing) -> Array:
    """A (channels, height, width) float32 tensor of ``image``, as ``timm.data.create_transform`` makes it for evaluation.

    Source: ``transforms_imagenet_eval`` of timm, over torchvision's rounding of sizes and offsets.
    """
    from PIL import Image

    channels, height, width = spec.input_size
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise InputRejected(f"input_size: no way to make {channels} channels of an image")
    image = image.convert(mode)
    filters = Image.Resampling[spec.interpolation.upper()]
    scaled = (math.floor(height / spec.crop_pct), math.floor(width / spec.crop_pct))
    resized = _resized(image.size, scaled, spec.crop_mode)
    if resized[0] * resized[1] > _MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels would be resized to {resized[0]} x {resized[1]}")
    image = image.resize(resized, filters)
    fill = [round(255 * value) for value in spec.mean] if spec.crop_mode == "border" else [0] * channels
    image = _centre_crop(image, height, width, tuple(fill))
    pixels = np.asarray(image, dtype=np.float32).reshape(height, width, channels) / np.float32(255)
    mean, std = np.asarray(spec.mean, dtype=np.float32), np.asarray(spec.std, dtype=np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def _resized(size: tuple[int, int], scaled: tuple[int, int], crop_mode: str) -> tuple[int, int]:
    """(width, height) to resize an image of ``size`` (width, height) to before the crop; ``scaled`` is (height, width)."""
    width, height = size
    if crop_mode == "squash":
        return scaled[1], scaled[0]
    if crop_mode == "center" and scaled[0] == scaled[1]:  # torchvision truncates the longer side, timm rounds it below
        if width <= height:
            return scaled[0], int(scaled[0] * height / width)
        return int(scaled[0] * width / height), scaled[0]
    ratios = height / scaled[0], width / scaled[1]
    ratio = max(ratios) if crop_mode == "border" else min(ratios)
    return round(width / ratio), round(height / ratio)


def _centre_crop(image: Image.Image, height: int, width: int, fill: tuple[int, ...]) -> Image.Image:
    """Crop, or pad with ``fill``, to ``height`` by ``width`` around the centre."""
    from PIL import Image

    pad_left, pad_top = max((width - image.width) // 2, 0), max((height - image.height) // 2, 0)
    if image.width < width or image.height < height:
        canvas = Image.new(image.mode, (max(width, image.width), max(height, image.height)), fill if len(fill) > 1 else fill[0])
        canvas.paste(image, (pad_left, pad_top))
        image = canvas
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


@dataclasses.dataclass(frozen=True)
class ImageList:
    """Images of a folder with one subfolder per class: (path, class index), sorted by path; ``notes`` say what is not there."""

    images: list[tuple[Path, int]]
    notes: list[str]


def list_images(folder: Path, manifest: Manifest) -> ImageList:
    """The images of a folder with one subfolder per class, whose names are the manifest's labels.

    A manifest without labels leaves only the order: then there must be as many subfolders as classes. Raises ``InputRejected``
    where a subfolder is no class of the bundle, or there is no image.
    """
    found = scan_class_folders(folder)
    index, notes = _class_index(folder, found.classes, manifest)
    images = [(path, index[name]) for path, name in found.images]
    if not images:
        raise InputRejected(f"{folder}: its subfolders hold no images ({', '.join(IMAGE_SUFFIXES)})")
    if said := found.described():
        notes.append(said)
    if manifest.labels and (absent := sorted(set(manifest.labels) - set(found.classes))):
        notes.append(f"{len(absent)} of {manifest.classes} classes have no images here: {_some(absent)}")
    return ImageList(images, notes)


def _class_index(folder: Path, classes: list[str], manifest: Manifest) -> tuple[dict[str, int], list[str]]:
    if not manifest.labels:
        if len(classes) != manifest.classes:
            raise InputRejected(
                f"{folder}: has {len(classes)} subfolders for {manifest.classes} classes, and manifest.json has no labels "
                "to know them by; pass one subfolder per class, in the order of the classes"
            )
        note = "manifest.json has no labels: the subfolders, sorted, were taken for the classes in order"
        return {name: number for number, name in enumerate(classes)}, [note]
    index = {label: number for number, label in enumerate(manifest.labels)}
    unknown = [name for name in classes if name not in index]
    if unknown:
        raise InputRejected(
            f"{folder}: {len(unknown)} of its {len(classes)} subfolders are no classes of this bundle: {_some(unknown)}; "
            f"its classes are {_some(manifest.labels)}. Name every subfolder as its class in manifest.json's labels"
        )
    if len(index) != len(manifest.labels):
        twice = next(label for number, label in enumerate(manifest.labels) if index[label] != number)
        raise InputRejected(f"{folder}: manifest.json has the label {twice!r} twice, so no subfolder can be known by it")
    return index, []


def _some(names: list[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    shown = ", ".join(repr(name[:40]) for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "none"


def batches(images: list[tuple[Path, int]], spec: Preprocessing, size: int) -> Iterator[tuple[Array, Array]]:
    """Yield (n, channels, height, width) float32 tensors and (n,) int64 class indices.

    Raises ``InputRejected`` for a file that is no image, ``Unavailable`` without Pillow.
    """
    mode = "L" if spec.input_size[0] == 1 else "RGB"
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        tensors = []
        for path, _ in chunk:
            try:
                tensors.append(preprocess(read_image(path, mode), spec))
            except (ValueError, MemoryError) as error:  # too thin to be resized
                raise InputRejected(f"{path}: cannot be preprocessed: {error or type(error).__name__}") from error
        yield np.stack(tensors), np.array([target for _, target in chunk], dtype=np.int64)
