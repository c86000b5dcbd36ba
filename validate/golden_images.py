"""The pictures that the golden inputs were made of, and the manifest's rule played again on them, in Pillow and NumPy alone."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected
from patchslim.images import read_image
from validate.bundle import read_file
from validate.golden import Golden
from validate.images import preprocess, resized_to
from validate.manifest import Manifest
from validate.preprocessing import Preprocessing, PreprocessingRule

#: Pixels that the pictures of a bundle may have and be resized to, together; more are refused before they are decoded.
MAX_PIXELS = 1 << 27
_MAX_BYTES = 4 * MAX_PIXELS  # of one PNG file: three bytes a pixel, and what does not compress
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEAD = 29  # bytes: signature, then the chunk IHDR
_COLOURS = {0: "L", 2: "RGB"}  # PNG's types of colour


def replay(folder: Path, manifest: Manifest, golden: Golden, say: Callable[[str], None] = lambda what: None) -> None:
    """Make the golden inputs anew of the pictures, and compare all bits.

    ``say`` is told what is looked at next. Raises ``InputRejected`` naming the first picture that is none, or gives another
    tensor; ``Unavailable`` without Pillow.
    """
    rule = manifest.preprocessing.rule
    assert rule is not None  # the manifest has it where it has pictures
    pixels = 0
    for image in manifest.golden_images:
        path = folder / image.path
        say(image.path)
        if image.row >= len(golden.inputs):
            raise InputRejected(f"{path}: is of row {image.row}, and golden.npz has {len(golden.inputs)}")
        data = read_file(folder, manifest, image.path, _MAX_BYTES)
        size = _size(data, path, rule.colours)
        pixels += cost_of(size, rule)
        if pixels > MAX_PIXELS:
            raise InputRejected(f"{path}: the pictures have more than {MAX_PIXELS} pixels together")
        found = _preprocessed(data, size, path, manifest.preprocessing, rule.colours)
        if fault := difference(found, golden.inputs[image.row]):
            made = f"Pillow {version('pillow')} here, {manifest.tools.get('pillow', 'another')} where it was made"
            raise InputRejected(
                f"{path}: preprocessing.rule in manifest.json does not make row {image.row} of golden.npz of it: "
                f"{fault} ({made})"
            )


def cost_of(size: tuple[int, int], rule: PreprocessingRule) -> int:
    """Pixels that are handled to preprocess a picture of ``size`` (width, height): its own and those that it is resized to."""
    return math.prod(size) + math.prod(resized_to(size, rule.resize))


def _size(data: bytes, path: Path, colours: str) -> tuple[int, int]:
    """Width and height that a PNG file of 8 bits in ``colours`` states; raises ``InputRejected`` for any other file."""
    head = data[:_HEAD]
    if len(head) < _HEAD or not head.startswith(_SIGNATURE) or head[12:16] != b"IHDR":
        raise InputRejected(f"{path}: is no PNG file")
    bits, kind = head[24], _COLOURS.get(head[25])
    if bits != 8 or kind != colours:
        raise InputRejected(f"{path}: is no PNG file of 8 bits per channel in {colours}")
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if not width or not height:
        raise InputRejected(f"{path}: is a picture of {width} x {height} pixels")
    return width, height


def _preprocessed(data: bytes, size: tuple[int, int], path: Path, spec: Preprocessing, colours: str) -> Array:
    try:
        picture = read_image(io.BytesIO(data), colours)
        if picture.size != size:
            raise InputRejected("states its size twice")
        return preprocess(picture, spec)
    except (InputRejected, ValueError, MemoryError) as error:
        raise InputRejected(f"{path}: cannot be preprocessed: {error or type(error).__name__}") from error


def difference(found: Array, expected: Array) -> str:
    """How two float32 tensors of one shape differ, in words; "" where all bits are the same."""
    differing = found.view(np.uint32) != expected.view(np.uint32)
    if not differing.any():
        return ""
    return f"{differing.sum()} of {expected.size} values differ, by at most {np.abs(found - expected).max():.3g}"
