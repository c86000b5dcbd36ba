"""Temporary folders that the next run sweeps where this one is killed, exchanges of folders, and locks. No half states."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from patchslim.errors import PatchslimError
from patchslim.system_errors import as_error_of_ours

fcntl: Any
try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system: nothing is locked there, and nothing swept
    fcntl = None

#: Seconds to wait for another process that publishes to the same place: it holds the lock while it hashes one bundle.
PATIENCE_S = 120.0
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fs.h
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def temporary_folder(prefix: str, suffix: str, above: Path) -> Iterator[Path]:
    """A new folder ``PREFIX<16 digits>SUFFIX`` in ``above``, removed when the block ends, with what is left in it.

    It is locked while it is used, so that ``leftovers`` finds only those whose process is gone. Raises ``OSError``.
    """
    folder, handle = above / f"{prefix}{secrets.token_hex(8)}{suffix}", None
    try:  # from before it is there: an interrupt may come at any moment
        while True:
            folder.mkdir()
            handle = _lock(folder, PATIENCE_S)
            if folder.is_dir():  # else another process took it for a leftover before it was locked
                break
            _close(handle)
            handle = None
            folder = above / f"{prefix}{secrets.token_hex(8)}{suffix}"
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException:  # an interrupt fell into it, which ``rmtree`` may turn into an OSError; one signal comes once
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            _close(handle)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """An empty new file ``.NAME.<number>.part`` beside ``path``, removed when the block ends unless it was renamed.

    Removes those that killed processes left beside it. Raises ``OSError``.
    """
    part, handle = _part_of(path), None
    sweep(rf"\.{re.escape(path.name)}\.[0-9]+\.part", path.parent)
    try:  # as above
        while True:
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666))
            handle = _lock(part, PATIENCE_S)
            if part.exists():  # else another process took it for a leftover before it was locked
                break
            _close(handle)
            handle, part = None, _part_of(path)
        yield part
    finally:
        try:
            part.unlink(missing_ok=True)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            _close(handle)


def _part_of(path: Path) -> Path:
    """A name of its own for each file that is to be ``path``: threads write at once, and processes of two containers as one."""
    return path.with_name(f".{path.name}.{secrets.randbits(63)}.part")


def _close(handle: int | None) -> None:
    """Close a handle, if there is one."""
    if handle is not None:
        os.close(handle)


def leftovers(form: str, above: Path) -> Iterator[Path]:
    """The temporary files and folders in ``above`` whose process is gone, each locked while the caller looks at it.

    ``form`` is a regular expression for the whole name, such as ``temporary_form`` gives.
    """
    names: list[str] = []
    with contextlib.suppress(OSError):  # not there, or a folder that may be written and not read
        names = sorted(name for name in os.listdir(above) if re.fullmatch(form, name))
    for name in names:
        path = above / name
        if path.is_symlink() or (handle := _lock(path)) is None:
            continue
        try:
            yield path
        finally:
            os.close(handle)


def temporary_form(prefix: str, suffix: str) -> str:
    """The names of ``temporary_folder``, as a regular expression; ``prefix`` is one itself."""
    return rf"{prefix}(?:[0-9a-f]{{16}}|[a-z0-9_]{{8}}){re.escape(suffix)}"  # 8: tempfile's, of earlier versions


def sweep(form: str, above: Path) -> None:
    """Remove the ``leftovers`` of ``form`` in ``above``."""
    for path in leftovers(form, above):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on ``folder`` for the block, where the file system has locks; nothing is written for it.

    Raises ``TimeoutError`` where another process holds it for longer than ``PATIENCE_S``.
    """
    handle = _lock(folder, PATIENCE_S)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system cannot. Raises ``OSError``."""
    if (rename := _renameat2()) is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def disk_full(error: BaseException, folder: Path) -> bool:
    """Whether ``error`` came of a full disk or quota under ``folder``, whichever library raised it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    if isinstance(error, PatchslimError) or as_error_of_ours(error) is not None:
        return not isinstance(error, PatchslimError)
    with contextlib.suppress(OSError):  # NumPy says neither a number nor a word of it
        found = os.statvfs(next(place for place in (folder, *folder.parents) if place.is_dir()))
        return isinstance(error, (OSError, RuntimeError)) and found.f_bavail * found.f_frsize < 1 << 16
    return False


def _lock(folder: Path, patience: float = 0.0) -> int | None:
    """An open handle that holds the lock on ``folder``; None where it is held elsewhere or cannot be had."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_NONBLOCK | _NO_FOLLOW)
    except OSError:
        return None
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.01)
                continue
            os.close(handle)
            if patience:
                raise TimeoutError(f"{folder}: locked by another process for {patience:.0f} s") from None
            return None
        except OSError:  # no locks on this file system
            os.close(handle)
            return None


def _renameat2() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        function: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
        return function
    return None
