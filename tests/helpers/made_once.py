"""Files that a test run makes once, whichever of its processes needs them first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import onnx

#: Names the run's folder to all of its processes; tests/conftest.py makes it and removes it.
FOLDER = "PATCHSLIM_TEST_FILES"


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder ``name``; ``make`` writes it to the path that it is given, unless another process has."""
    folder = Path(os.environ[FOLDER])
    path, part = folder / name, folder / f"part-{name}"
    if not path.exists():
        with (folder / f"lock-{name}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, also by a process that dies
            if not path.exists():
                make(part)
                part.rename(path)
    return path


def model_made_once(name: str, make: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
    """The ONNX model ``name``, of which ``make`` makes the first copy."""
    return onnx.load(made_once(f"{name.replace(':', '_')}.onnx", lambda path: onnx.save(make(), path)))
