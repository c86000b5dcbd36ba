"""Where finished stages are kept, and what compilers took time for."""

from __future__ import annotations

import os
from pathlib import Path

from patchslim.errors import UsageError

#: What TensorRT measured and TensorRT-RTX compiled, in the work folder.
TENSORRT_CACHE = "tensorrt"


def default_work() -> Path:
    """The work folder: ``$PATCHSLIM_WORK``, else ``patchslim`` in the user's cache folder.

    Raises ``UsageError`` where the user has none.
    """
    if work := os.environ.get("PATCHSLIM_WORK"):
        return Path(work)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "patchslim"
    try:
        return Path.home() / ".cache" / "patchslim"
    except RuntimeError as error:
        raise UsageError("this user has no home directory to keep stages in", next_step="pass --work FOLDER") from error


def tensorrt_cache() -> Path | None:
    """The default folder of what TensorRT measured and TensorRT-RTX compiled; None where the user has no such folder."""
    try:
        return default_work() / TENSORRT_CACHE
    except UsageError:
        return None
