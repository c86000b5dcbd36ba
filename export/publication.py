"""Putting the hand-off folder in its place, whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from patchslim.errors import InputRejected, UsageError
from patchslim.files import digest
from patchslim.folders import disk_full, exchange, leftovers, locked, temporary_folder, temporary_form
from patchslim.signatures import SIGNATURE, sign_folder
from validate.bundle import MANIFEST, PLAN, SUMS, list_files, load_manifest, sums_fault, write_manifest, write_sums
from validate.manifest import Manifest

_NEW, _OLD = "new", "old"
States = dict[str, tuple[int, int, int, int]]
#: What in a folder is not of an earlier one of ours, and so would be lost with it, in words; "" where nothing is.
Foreign = Callable[[Path], str]
_LONGEST_NAME = 255  # bytes, on every file system that is in use


def check_place(folder: Path, foreign: Foreign | None = None) -> None:
    """Raise ``UsageError`` unless ``folder`` is free, empty, or an earlier bundle that may be replaced.

    ``foreign`` says what is not to be lost where the folder is none of a bundle's.
    """
    try:
        _check_place(folder, foreign or _foreign)
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {folder}: cannot be used: {_cause(error)}") from error


def _check_place(folder: Path, foreign: Foreign) -> None:
    if folder.name in ("", ".."):
        raise UsageError(f"--output {folder}: needs a folder of its own, with a name")
    try:
        length = len(f".{folder.name}.{'0' * 16}.part".encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"--output {os.fsencode(folder)!r}: the name is not UTF-8; the manifest holds it") from error
    if length > _LONGEST_NAME:
        most = _LONGEST_NAME - length + len(folder.name.encode())
        raise UsageError(f"--output {folder.name[:40]}...: the name is too long; pass one of {most} bytes or fewer")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--output {folder}: is not a folder")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder}: {above} is not a folder that can be written")
    if folder.is_dir():
        _check_rights(folder, above)
        if fault := foreign(folder):
            raise UsageError(f"--output {folder}: {fault}; move that away or pass a new folder")


def _check_rights(folder: Path, above: Path) -> None:
    """Raise ``UsageError`` where the user may not replace what is in ``folder``, as where another user made it."""
    parent, mine = above.stat(), folder.stat().st_uid
    sticky = parent.st_mode & stat.S_ISVTX and os.geteuid() not in (0, mine, parent.st_uid)
    inside = (Path(place) for place, _, _ in os.walk(folder))
    if sticky or not all(os.access(place, os.R_OK | os.W_OK | os.X_OK) for place in inside):
        raise UsageError(f"--output {folder}: is another user's, and cannot be replaced; pass a new folder")


def _foreign(folder: Path) -> str:
    """What in ``folder`` is not an earlier bundle of ours, and so would be lost with it; "" if nothing is.

    A file is known by the digest that the manifest records of it: one that was added or edited is its author's.
    """
    try:
        names = list_files(folder)
    except InputRejected as error:
        return str(error)
    if not names:
        return ""
    try:
        manifest = load_manifest(folder)
    except InputRejected:
        return f"holds {names[0]}, which is not of a bundle"
    recorded = {record.path: record for record in manifest.files}
    for name in names:
        if name == MANIFEST:
            continue
        if name == SUMS:
            if sums_fault(folder, manifest):
                return f"holds {name}, which was changed after the bundle was made"
            continue
        if name == SIGNATURE:  # of the bundle as it was
            continue
        if (record := recorded.get(name)) is None:
            return f"holds {name}, which is not of a bundle"
        path = folder / name
        try:
            if path.stat().st_size != record.size or digest(path) != record.sha256:
                return f"holds {name}, which was changed after the bundle was made"
        except OSError as error:
            return f"holds {name}, which cannot be read ({_cause(error)})"
    if PLAN in names and recorded[PLAN].sha256 != manifest.plan_digest:
        return f"holds {MANIFEST}, which is not of a bundle"
    return ""


def recover(folder: Path) -> None:
    """Sweep what killed runs left beside ``folder``; where one was moving the earlier bundle away, that is put back."""
    prefix, suffix = _box(folder)
    try:
        with locked(folder.parent):
            for box in leftovers(temporary_form(re.escape(prefix), suffix), folder.parent):
                if (box / _OLD).is_dir() and not folder.exists():
                    (box / _OLD).rename(folder)
                shutil.rmtree(box, ignore_errors=True)
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be used: {_cause(error)}") from error


def publish(fill: Callable[[Path], Manifest], folder: Path, key: Path | None = None) -> None:
    """Have ``fill`` make the bundle in a temporary folder beside ``folder``, its manifest and sums last, and put it in place.

    An earlier bundle is exchanged for it in one step where the kernel can do that, so that a reader finds one of the two at any
    moment; when anything fails it stays, and nothing else is left behind. Of several that publish to one place the last one's
    bundle stays. With a private ``key`` the bundle is signed. Raises ``UsageError`` where the place cannot be written, or holds
    anything that is not a bundle of ours, and as ``sign_folder`` does.
    """

    def whole(new: Path) -> None:
        manifest = fill(new)
        write_manifest(new, manifest)
        write_sums(new, manifest)
        if key is not None:
            sign_folder(new, key)

    publish_folder(whole, folder, _foreign)


def publish_folder(fill: Callable[[Path], None], folder: Path, foreign: Foreign) -> None:
    """``publish`` a folder of any kind, which ``fill`` makes whole; what else lies in the parent of what it fills vanishes."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover(folder)
        with temporary_folder(*_box(folder), folder.parent) as box:
            new = box / _NEW
            new.mkdir()
            fill(new)
            with locked(folder.parent):  # no file of its own that would be left behind; held for as long as a bundle is hashed
                before = _states(folder)
                check_place(folder, foreign)
                _put(new, folder, box / _OLD, before, foreign)
    except OSError as error:
        if disk_full(error, folder.parent):
            raise UsageError(f"--output {folder}: the disk is full; free some space or pass another folder") from error
        raise UsageError(f"--output {folder}: cannot be written: {_cause(error)}") from error


def _put(new: Path, folder: Path, old: Path, before: States, foreign: Foreign) -> None:
    """Rename ``new`` to ``folder``, whose files were checked in the states ``before``; ``old`` is a free place."""
    if not folder.exists():
        new.rename(folder)
        return
    if exchange(new, folder):
        if _states(new) != before and (fault := foreign(new)):  # put there since the last look
            exchange(new, folder)
            raise UsageError(f"--output {folder}: {fault}; move that away or pass a new folder")
        return
    try:
        folder.rename(old)
        if _states(old) != before and (fault := foreign(old)):
            raise UsageError(f"--output {folder}: {fault}; move that away or pass a new folder")
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():  # failed or interrupted between the two renames
            old.rename(folder)


def _states(folder: Path) -> States:
    """Size, inode and times of every file in ``folder``, by relative path: what a rename of the folder does not change."""
    found: States = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            state = path.lstat()
            found[str(path.relative_to(folder))] = (state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns)
    return found


def _box(folder: Path) -> tuple[str, str]:
    return f".{folder.name}.", ".part"


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
