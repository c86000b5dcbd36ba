"""Opening what others wrote: regular files alone, no more bytes than allowed, and the digest of the bytes that are used."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from pathlib import Path

from patchslim.errors import InputRejected

_BLOCK = 1 << 20  # bytes per read


def open_regular(path: Path, *, follow: bool = True) -> io.BufferedReader:
    """Open a regular file for reading; ``follow`` False refuses a link in its place.

    A pipe does not block, and a device is not touched. Raises ``InputRejected`` for what is not a regular file, ``OSError``.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not follow and path.is_symlink():  # where the system has no O_NOFOLLOW
        raise InputRejected(f"{path}: is a link, not a regular file")
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISREG(mode):  # looked at before as well: only opening some devices has effects already
        file = os.fdopen(os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0))), "rb")
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise InputRejected(f"{path}: is not a regular file")


def digest(path: Path) -> str:
    """SHA-256 of a regular file's bytes, in hexadecimal; raises ``InputRejected`` for what is none, ``OSError``."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bounded(path: Path, limit: int, what: str, *, follow: bool = True) -> bytes:
    """The bytes of a regular file of at most ``limit``; ``what`` is what messages call it.

    Raises ``InputRejected`` naming the file and the fault.
    """
    try:
        with open_regular(path, follow=follow) as file:
            data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)  # Python makes room for all that is asked for
            while len(data) <= limit and (more := file.read(min(limit + 1 - len(data), _BLOCK))):  # it grew, or has no size
                data += more
    except FileNotFoundError as error:
        raise InputRejected(f"{path}: is missing: it cannot be read as a {what}") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputRejected(f"{path}: cannot be read as a {what}: {reason}") from error
    if len(data) > limit:
        raise InputRejected(f"{path}: not a valid {what}: has more than the {limit} bytes allowed")
    return data


def read_verified(path: Path, size: int, sha256: str) -> bytes:
    """The bytes of a file that is no link and has ``size`` bytes of the digest ``sha256``.

    They are read once, so that what was checked is what is used. Raises ``InputRejected`` where the file is another one.
    """
    data = read_bounded(path, size, f"file of {size} bytes", follow=False)
    if len(data) != size:
        raise InputRejected(f"{path}: has {len(data)} bytes, not {size}: truncated or replaced")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputRejected(f"{path}: its SHA-256 is not the one in manifest.json: corrupt or replaced")
    return data


def copy_verified(path: Path, size: int, sha256: str, to: Path) -> None:
    """Copy a file as ``read_verified`` reads it, without holding it in memory; raises as that does, and ``OSError``."""
    hasher, copied = hashlib.sha256(), 0
    with open_regular(path, follow=False) as source, to.open("xb") as target:
        while copied <= size and (block := source.read(_BLOCK)):
            copied += len(block)
            hasher.update(block)
            target.write(block)
    if copied != size or hasher.hexdigest() != sha256:
        raise InputRejected(f"{path}: its size or SHA-256 is not the one in manifest.json: corrupt or replaced")
