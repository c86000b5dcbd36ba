"""Bytes that took time to make, kept in files that say their own digest: what is damaged there is as good as not there."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path

from patchslim.folders import temporary_file

_DIGEST = hashlib.sha256().digest_size
_LOG = logging.getLogger("patchslim")


def kept_blob(path: Path) -> bytes | None:
    """What ``keep_blob`` wrote to ``path``; None where there is nothing, or not all of it, or anything else.

    Warns of what is there and not whole.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, blob = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(blob).digest() == digest:
        return blob
    warn_of_dropped(path, "it is damaged")
    return None


def warn_of_dropped(path: Path, why: str) -> None:
    """Warn that what is kept at ``path`` is of no use, and is made anew."""
    _LOG.warning("%s: is not used, since %s; it is made anew", path, why)


def keep_blob(path: Path, blob: bytes) -> None:
    """Write ``blob`` to ``path`` behind its digest, whole or not at all. A disk that takes no more is no fault."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path) as part:
            part.write_bytes(hashlib.sha256(blob).digest() + blob)
            part.replace(path)
