"""Bytes that took time to make, kept in files that say their own digest: what is damaged there is as good as not there."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from patchslim.folders import temporary_file

_DIGEST = hashlib.sha256().digest_size


def kept_blob(path: Path) -> bytes | None:
    """What ``keep_blob`` wrote to ``path``; None where there is nothing, or not all of it, or anything else."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, blob = data[:_DIGEST], data[_DIGEST:]
    return blob if hashlib.sha256(blob).digest() == digest else None


def keep_blob(path: Path, blob: bytes) -> None:
    """Write ``blob`` to ``path`` behind its digest, whole or not at all. A disk that takes no more is no fault."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path) as part:
            part.write_bytes(hashlib.sha256(blob).digest() + blob)
            part.replace(path)
