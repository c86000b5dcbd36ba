"""Images as files: which are read, from which class folders, and how they become 8 bits. One rule for every door.

- Read are the suffixes in ``IMAGE_SUFFIXES``, in any letter case. Others are counted (``ClassFolders.left_out``), not read.
- A class is the name of the folder in which an image lies, at any depth, as timm reads folders.
- Grey pictures of 16 bits keep their high byte, as Pillow keeps it of colours of 16 bits. Pictures of 32 bits or of fractions
  have no range that a file states, and are refused.
- The EXIF orientation is not applied: timm and torchvision do not apply it either, so that a model has learnt from pictures as
  they are stored. Rotate the files themselves where that is not wanted.
- A picture of more than ``MAX_PIXELS`` is refused before it is decoded.

Pillow is imported when an image is read.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from patchslim.errors import InputRejected, Unavailable
from patchslim.files import open_regular
from patchslim.packages import install_command

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: Pixels of an image; more are refused. Above it Pillow warns of a decompression bomb.
MAX_PIXELS = 89_478_485
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_WITHOUT_RANGE = ("I", "F")


@dataclass(frozen=True)
class ClassFolders:
    """The images of a folder, by class, and what was passed over."""

    root: Path
    images: list[tuple[Path, str]]  # (file, class name), in natural order of the path, as timm sorts
    left_out: dict[str, int]  # how many files are not read, by suffix ("" where a file has none)
    empty: list[str]  # names of folders that hold neither files nor folders

    @property
    def classes(self) -> list[str]:
        """The names of the classes that have images, in natural order: the index that timm gives each."""
        return sorted({name for _, name in self.images}, key=natural_key)

    def described(self) -> str:
        """What was left out, in words; "" where nothing was."""
        parts = []
        if self.left_out:
            kinds = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(self.left_out.items()))
            parts.append(f"{sum(self.left_out.values())} file(s) left out ({kinds}; read are {', '.join(IMAGE_SUFFIXES)})")
        if self.empty:
            parts.append(f"empty folder(s): {', '.join(self.empty[:8])}{' ...' if len(self.empty) > 8 else ''}")
        return f"{self.root}: {'; '.join(parts)}" if parts else ""


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which "class 2" comes before "class 10", in any letter case, as timm orders names."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name.lower())]


def scan_class_folders(root: Path) -> ClassFolders:
    """Find the images under ``root``, each in a folder named after its class; hidden files and folders are passed over.

    Images that lie in ``root`` itself are of the class "" where there are no others, else left out.
    Raises ``InputRejected`` for a folder that cannot be read, one whose name is no UTF-8, and one whose files are all left out.
    """
    found: list[tuple[Path, str]] = []
    left_out: Counter[str] = Counter()
    empty: list[str] = []

    def refuse(error: OSError) -> None:
        raise InputRejected(f"{root}: cannot be read as class folders of images: {error}") from error

    for folder, below, files in os.walk(root, onerror=refuse, followlinks=True):
        below[:] = sorted(each for each in below if not each.startswith(".") and not _leads_back(folder, each))
        here, name = Path(folder), "" if folder == str(root) else os.path.basename(folder)
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputRejected(f"{root}: the class folder {name!a} has a name that is not UTF-8: rename it") from error
        shown = [file for file in files if not file.startswith(".")]
        images = [file for file in shown if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES]
        others = Counter(os.path.splitext(file)[1].lower() for file in shown)
        others.subtract(os.path.splitext(file)[1].lower() for file in images)
        left_out.update(+others)
        if shown and not images and not below and name:
            kinds = ", ".join(sorted(suffix or "no suffix" for suffix in +others))
            raise InputRejected(
                f"{here}: none of its {len(shown)} file(s) is read ({kinds}): images are {', '.join(IMAGE_SUFFIXES)}; "
                "convert them, or move the folder away"
            )
        if not shown and not below and name:
            empty.append(name)
        found += [(here / file, name) for file in images]
    in_classes = [(path, name) for path, name in found if name]
    if in_classes:
        left_out.update(path.suffix.lower() for path, name in found if not name)
    return ClassFolders(
        root, sorted(in_classes or found, key=lambda one: natural_key(str(one[0]))), dict(left_out), sorted(empty)
    )


def _leads_back(folder: str, name: str) -> bool:
    """Whether ``name`` in ``folder`` is a link to a folder above it: following it would never end."""
    path = os.path.join(folder, name)
    return os.path.islink(path) and f"{os.path.realpath(folder)}{os.sep}".startswith(f"{os.path.realpath(path)}{os.sep}")


def read_image(source: Path | IO[bytes], mode: str = "RGB") -> Image:
    """Decode an image to 8 bits in ``mode`` ("RGB" or "L"), by the rules of this module.

    ``source`` is a path or a stream. Raises ``InputRejected`` with the reason, and the path where it is known; ``Unavailable``
    without Pillow.
    """
    try:
        from PIL import Image as Pillow
        from PIL import UnidentifiedImageError
    except ImportError as error:
        raise Unavailable(f"Pillow is not installed: {install_command('edge')}") from error
    where = f"{source}: " if isinstance(source, Path) else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, which are refused below, and of odd metadata
            with open_regular(source) if isinstance(source, Path) else source as stream, Pillow.open(stream) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputRejected(f"{where}{width} x {height} pixels: more than the {MAX_PIXELS} allowed")
                return _eight_bits(image).convert(mode)
    except InputRejected as error:
        if str(error).startswith(where):
            raise
        raise InputRejected(f"{where}{error}") from error
    except UnidentifiedImageError as error:  # whose own text may be the address of a stream in memory
        raise InputRejected(f"{where}not an image that can be decoded") from error
    except Exception as error:  # on damaged bytes a decoder raises whatever it runs into
        raise InputRejected(f"{where}cannot be decoded as an image: {error or type(error).__name__}") from error


def _eight_bits(image: Image) -> Image:
    from PIL import Image as Pillow

    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PPM", "PNG")):  # Pillow before 10.4: PNG is I
        import numpy as np

        high = np.asarray(image).astype(np.int64) >> 8
        return Pillow.fromarray(high.astype(np.uint8))
    if image.mode in _WITHOUT_RANGE:
        raise InputRejected(
            f"a picture of mode {image.mode} (32-bit values without a stated range): save it with 8 or 16 bits a channel"
        )
    return image
