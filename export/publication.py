"""Putting the hand-off folder in its place, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from patchslim.errors import UsageError
from validate.bundle import MANIFEST, write_manifest
from validate.manifest import Manifest


def check_place(folder: Path) -> None:
    """Raise ``UsageError`` unless ``folder`` is free, empty, or an earlier bundle that may be replaced."""
    if folder.name in ("", ".."):
        raise UsageError(f"--output {folder}: needs a folder of its own, with a name")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--output {folder}: is not a folder")
    if folder.is_dir() and (foreign := _foreign(folder)):
        raise UsageError(f"--output {folder}: holds {foreign}, which is not of a bundle; pass a new folder")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder}: {above} is not a folder that can be written")


def _foreign(folder: Path) -> str:
    """The first file in ``folder`` that an earlier bundle's manifest does not list, since it would be lost; "" if none is."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {MANIFEST, *(file["path"] for file in manifest["files"])} if "plan_digest" in manifest else set()
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    return next((name for name in names if name not in listed), "")


def publish(fill: Callable[[Path], Manifest], folder: Path) -> None:
    """Have ``fill`` make the bundle in a temporary folder beside ``folder``, write its manifest last, and rename it into place.

    An earlier bundle is replaced; when anything fails it stays, and nothing else is left behind.
    """
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
