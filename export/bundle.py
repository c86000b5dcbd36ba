"""Assembling the hand-off folder and putting it in its place, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from slimming.door import UsageError
from validate.schema import Manifest

MANIFEST = "manifest.json"


def check_place(folder: Path) -> None:
    """Raise ``UsageError`` unless ``folder`` is free, empty, or an earlier bundle that may be replaced."""
    if folder.name in ("", ".."):
        raise UsageError(f"--output {folder}: needs a folder of its own, with a name")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--output {folder}: is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UsageError(f"--output {folder}: holds something else than a bundle; pass a new folder")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder}: {above} is not a folder that can be written")


def publish(fill: Callable[[Path], Manifest], folder: Path) -> None:
    """Have ``fill`` make the bundle in a temporary folder beside ``folder``, write its manifest last, and rename it into place.

    An earlier bundle is replaced; when anything fails it stays, and nothing else is left behind.
    """
    from validate.bundle import write_manifest

    check_place(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        box = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be written: {error}") from error
    part, old = box / "new", box / "old"
    try:
        part.mkdir()
        write_manifest(part, fill(part))
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        if old.exists() and not folder.exists():  # failed or interrupted between the two renames
            old.rename(folder)
        shutil.rmtree(box, ignore_errors=True)
