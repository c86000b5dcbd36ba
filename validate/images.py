"""Images from a folder, preprocessed as the manifest says: timm's evaluation transform in Pillow and NumPy alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected
from patchslim.images import IMAGE_SUFFIXES, read_image, scan_class_folders
from validate.manifest import Manifest
from validate.preprocessing import MAX_RESIZED_PIXELS, CropRule, Preprocessing, ResizeRule

if TYPE_CHECKING:
    from PIL import Image


def preprocess(image: Image.Image, spec: Preprocessing) -> Array:
    """A (channels, height, width) float32 tensor of ``image``, by the rule of ``spec``; timm's transform gives the same bits.

    Raises ``InputRejected`` where no picture has so many channels, ``ValueError`` for one that cannot be resized.
    """
    from PIL import Image

    rule = spec.rule or spec.derived_rule()
    if rule is None:
        raise InputRejected(f"input_size: no way to make {spec.input_size[0]} channels of an image")
    image = image.convert(rule.colours)
    resized = resized_to(image.size, rule.resize)
    if resized[0] * resized[1] > MAX_RESIZED_PIXELS:  # thin ones grow without bound
        raise ValueError(f"{image.width} x {image.height} pixels would be resized to {resized[0]} x {resized[1]}")
    image = _centre_crop(image.resize(resized, Image.Resampling[rule.resize.filter.upper()]), rule.crop)
    pixels = np.asarray(image, dtype=np.float32).reshape(rule.crop.height, rule.crop.width, -1) / np.float32(rule.divide_by)
    mean, std = np.asarray(spec.mean, dtype=np.float32), np.asarray(spec.std, dtype=np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def resized_to(size: tuple[int, int], rule: ResizeRule) -> tuple[int, int]:
    """(width, height) to resize an image of ``size`` (width, height) to before the crop."""
    width, height = size
    if rule.side == "both":
        return rule.width, rule.height
    if rule.rounding == "down":
        if width <= height:
            return rule.width, int(rule.height * height / width)
        return int(rule.width * width / height), rule.height
    ratios = height / rule.height, width / rule.width
    ratio = min(ratios) if rule.side == "shorter" else max(ratios)
    return round(width / ratio), round(height / ratio)


def _centre_crop(image: Image.Image, rule: CropRule) -> Image.Image:
    """Crop, or pad, to the rule's size around the centre."""
    from PIL import Image

    width, height = rule.width, rule.height
    if image.width < width or image.height < height:
        fill = tuple(rule.fill) if len(rule.fill) > 1 else rule.fill[0]
        canvas = Image.new(image.mode, (max(width, image.width), max(height, image.height)), fill)
        canvas.paste(image, (max((width - image.width) // 2, 0), max((height - image.height) // 2, 0)))
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
