"""The device that results are measured on: whether it is there, and its name."""

from __future__ import annotations

import platform
from typing import Any, Literal

import timm
import torch

from patchslim.errors import Unavailable
from patchslim.timing import processor_name


def ensure_device(kind: Literal["cuda", "cpu"]) -> None:
    """Raise ``Unavailable`` where PyTorch sees no such device."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise Unavailable("PyTorch sees no CUDA device here; --tiny runs on a CPU")


def device_of(kind: Literal["cuda", "cpu"]) -> dict[str, Any]:
    """What the results were measured on."""
    found: dict[str, Any] = {"name": processor_name(), "kind": kind, "cpu": processor_name()}
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found |= {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}
    return found | {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
