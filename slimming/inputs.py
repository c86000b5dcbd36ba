"""What the options name is there: asked before PyTorch is loaded, which takes longer than the answer."""

from __future__ import annotations

import os
from pathlib import Path

from patchslim.errors import InputRejected
from patchslim.images import IMAGE_SUFFIXES

WEIGHTS = ("bundled", "pretrained", "random")
#: Data sets of timm's readers that are no folder of this machine.
NAMED_READERS = ("hfds", "hfids", "tfds", "torch")


def check_file(path: Path, what: str) -> None:
    """Raise ``InputRejected`` unless ``path`` is a file; ``what`` names it in the message."""
    if not path.is_file():
        raise InputRejected(f"{what} {path}: is {'not a file' if path.exists() else 'missing'}")


def check_weights(weights: str) -> None:
    """Raise ``InputRejected`` where ``--weights`` is a path and nothing is there."""
    if weights not in WEIGHTS and not Path(weights).exists():
        raise InputRejected(f"{weights}: no such weights file; --weights takes bundled, pretrained, random or a file")


def check_data(address: str) -> None:
    """Raise ``InputRejected`` where ``address`` is a path and nothing is there, or a folder without a single image."""
    prefix, _, rest = address.partition("/")
    if address == "digits" or prefix.lower() in NAMED_READERS:
        return
    if prefix.lower() == "wds":
        if not Path(rest).is_dir():
            raise InputRejected(f"{address}: {rest} is not a folder on this machine")
        return
    path = Path(address)
    if not path.exists():
        raise InputRejected(f"{address}: no such data; --data takes digits, a folder, FILE.tar, hfds/NAME or wds/PATH")
    if path.is_dir() and not _holds_an_image(path):
        raise InputRejected(f"{address}: holds no images in class folders")


def _holds_an_image(folder: Path) -> bool:
    found = os.walk(folder, followlinks=True)
    return any(name.lower().endswith((*IMAGE_SUFFIXES, ".tar")) for _, _, names in found for name in names)
