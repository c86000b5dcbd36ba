"""Assembling the hand-off folder and putting it in its place, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from slimming.door import UsageError
from validate.schema import Manifest

MANIFEST = "manifest.json"


def check_place(folder: Path) -> None:
    """Raise ``UsageError`` unless ``folder`` is free, empty, or an earlier bundle that may be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--output {folder}: is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UsageError(f"--output {folder}: holds something else than a bundle; pass a new folder")


def publish(fill: Callable[[Path], Manifest], folder: Path) -> None:
    """Have ``fill`` make the bundle in a temporary folder beside ``folder``, write its manifest last, and rename it into place.

    An earlier bundle is replaced; when anything fails it stays, and nothing else is left behind.
    """
    from validate.bundle import write_manifest

    check_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        part.mkdir()
        write_manifest(part, fill(part))
        if folder.exists():
            folder.rename(old)
        try:
            part.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
