"""A bundle's records, written and read: digests, the file list, ``manifest.json`` and ``parity.json``."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import TypeVar

from patchslim.errors import InputRejected
from patchslim.records import StrictRecord, load_record, save_record
from validate.manifest import FileRecord, Manifest, ParityReport, plain_path

MANIFEST = "manifest.json"
PARITY = "parity.json"
PLAN = "plan.json"
GOLDEN = "golden.npz"
_MAX_FILES = 10_000
_Record = TypeVar("_Record", bound=StrictRecord)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; raises ``OSError``."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> list[str]:
    """Plain relative paths of every file under ``folder``, sorted; raises ``InputRejected``.

    Links, devices, pipes and sockets are refused, whatever they point to: a bundle is folders and regular files.
    """
    names: list[str] = []
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            for entry in os.scandir(current):
                path = current / entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif entry.is_file(follow_symlinks=False):
                    names.append(plain_path(path.relative_to(folder).as_posix()))
                else:
                    raise InputRejected(f"{path}: is a link or a special file; a bundle holds regular files and folders only")
        except (OSError, ValueError) as error:
            raise InputRejected(f"{current}: cannot be read as a bundle's folder: {error}") from error
        if len(names) + len(waiting) > _MAX_FILES:
            raise InputRejected(f"{folder}: holds more than {_MAX_FILES} files and folders")
    return sorted(names)


def record_files(folder: Path) -> list[FileRecord]:
    """Records of every file under ``folder`` but ``manifest.json``, sorted by path; raises ``InputRejected``."""
    return [
        FileRecord(path=name, size=(folder / name).stat().st_size, sha256=digest(folder / name))
        for name in list_files(folder)
        if name != MANIFEST
    ]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` whole or not at all, last of the bundle's files; raises ``OSError``."""
    save_record(folder / MANIFEST, manifest)


def write_parity(folder: Path, report: ParityReport) -> None:
    """Write ``parity.json`` whole or not at all; raises ``OSError``."""
    save_record(folder / PARITY, report)


def load_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``; raises ``InputRejected`` naming the file and the fault."""
    return _load(folder / MANIFEST, Manifest, "manifest")


def load_parity(folder: Path) -> ParityReport:
    """Read and check ``parity.json``; raises ``InputRejected`` naming the file and the fault."""
    return _load(folder / PARITY, ParityReport, "parity report")


def _load(path: Path, kind: type[_Record], what: str) -> _Record:
    """Read a record of the bundle itself: no link out of it, and nothing that blocks the reader."""
    try:
        is_file = stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        is_file = True  # missing, which ``load_record`` says
    if not is_file:
        raise InputRejected(f"{path}: is not a regular file")
    return load_record(path, kind, what)
