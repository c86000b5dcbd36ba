"""Images from a folder, preprocessed as the manifest says: timm's evaluation transform in Pillow and NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected, Unavailable
from patchslim.packages import install_command
from validate.manifest import Manifest, Preprocessing

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
    image = image.resize(_resized(image.size, scaled, spec.crop_mode), filters)
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


def list_images(folder: Path, manifest: Manifest) -> list[tuple[Path, int]]:
    """(path, class index) of the images of a folder with one subfolder per class, sorted by path.

    Subfolders are matched to the manifest's labels by name; where they are other names but as many as the classes, by sorted
    order, as torchvision's ImageFolder does. Raises ``InputRejected`` when neither fits or there is no image.
    """
    try:
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        index = {label: number for number, label in enumerate(manifest.labels)}
        if not classes or not set(classes) <= set(index):
            if len(classes) != manifest.classes:
                raise InputRejected(
                    f"{folder}: its {len(classes)} subfolders are neither named after the labels in manifest.json "
                    f"nor as many as the {manifest.classes} classes"
                )
            index = {name: number for number, name in enumerate(classes)}
        found = [
            (path, index[name])
            for name in classes
            for path in sorted((folder / name).iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
    except OSError as error:
        raise InputRejected(f"{folder}: cannot be read as a folder of images: {error}") from error
    if not found:
        raise InputRejected(f"{folder}: its subfolders hold no images")
    return found


def batches(images: list[tuple[Path, int]], spec: Preprocessing, size: int) -> Iterator[tuple[Array, Array]]:
    """Yield (n, channels, height, width) float32 tensors and (n,) int64 class indices.

    Raises ``InputRejected`` for a file that is no image, ``Unavailable`` without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise Unavailable(f"Pillow is not installed; install it: {install_command('edge')}") from error

    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        tensors = []
        for path, _ in chunk:
            try:
                with Image.open(path) as image:
                    tensors.append(preprocess(image, spec))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise InputRejected(f"{path}: cannot be read as an image: {error}") from error
        yield np.stack(tensors), np.array([target for _, target in chunk], dtype=np.int64)
