"""What TensorRT measured while it built, and what TensorRT-RTX compiled while it ran, kept between runs.

Each file is for one GPU, driver and release, which are in its name; ``blob_cache`` checks that it is whole, and TensorRT that
it fits. Written against the Python API of TensorRT 10 and 11 and TensorRT-RTX 1.7. Executed without a GPU are the files and, by
TensorRT-RTX's builder, a timing cache that is not taken; what they gain was not measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchslim import cuda
from patchslim.blob_cache import keep_blob, kept_blob, warn_of_dropped


def timing_cache_file(folder: Path, backend: str, version: str) -> Path:
    """Where the times of kernels are kept in ``folder`` that a ``backend`` of this ``version`` measured on this GPU."""
    return folder / f"{_name(backend, version)}.timing"


def runtime_cache_file(folder: Path, plan: bytes, version: str) -> Path:
    """Where the kernels are kept in ``folder`` that TensorRT-RTX compiled of the engine ``plan`` for this GPU."""
    return folder / f"{_name(hashlib.sha256(plan).hexdigest(), version)}.kernels"


def _name(*facts: str) -> str:
    here = [cuda.device_name(), cuda.local_target(), cuda.driver_version()]
    return hashlib.sha256(json.dumps([facts, here]).encode()).hexdigest()


def attach_timing_cache(config: Any, kept: bytes, warnings: Sequence[str]) -> bool:
    """Have a builder use and extend the times of kernels that were ``kept``, b"" for none; returns whether it takes them.

    What it does not take is replaced by an empty cache. ``warnings`` are the logger's, which grow meanwhile: of what is
    damaged, or of another device, TensorRT makes an empty cache by itself, and only warns.
    """
    before = len(warnings)
    cache = config.create_timing_cache(kept)
    taken = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
    if not taken:
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return taken and not any("timing cache" in warning.lower() for warning in warnings[before:])


class RuntimeCache:
    """The kernels that TensorRT-RTX compiled for a loaded ``engine`` on this GPU, kept in ``path``."""

    def __init__(self, engine: Any, path: Path) -> None:
        self._path, self._kept = path, kept_blob(path)
        self._config = engine.create_runtime_config()
        self._cache = self._config.create_runtime_cache()
        if self._kept is not None and not self._cache.deserialize(self._kept):
            warn_of_dropped(path, "TensorRT-RTX does not take it here")
        self._config.set_runtime_cache(self._cache)
        self.context = engine.create_execution_context(self._config)

    def keep(self) -> None:
        """Write the kernels that are there now, unless they are kept already."""
        if (blob := bytes(self._cache.serialize())) != self._kept:
            keep_blob(self._path, blob)
            self._kept = blob
