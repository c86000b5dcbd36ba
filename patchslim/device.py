"""The machine that this runs on, as reports name it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated

from pydantic import Field

from patchslim import cuda
from patchslim.packages import PACKAGES, installed_version
from patchslim.records import StrictRecord

_Text = Annotated[str, Field(max_length=1024)]


class Device(StrictRecord):
    """A machine: what computes on it, and what drives that. It has no name or address of its own in here."""

    platform: _Text = Field(description="operating system and its release")
    machine: _Text = Field(description="instruction set, as 'x86_64' or 'aarch64'")
    processor: _Text
    cores: Annotated[int, Field(ge=0)] = Field(description="logical ones; 0 where the system does not tell")
    python: _Text
    gpu: _Text | None = Field(description="null without a driver or a visible GPU")
    compute_capability: Annotated[str, Field(pattern=r"^sm[0-9]{2,3}$")] | None = None
    cuda_driver: _Text | None = Field(default=None, description="the newest CUDA that the driver supports")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instruction sets of this processor, in Linux's words; empty where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])


def this_device() -> Device:
    """The machine that this runs on."""
    from patchslim.timing import processor_name

    return Device(
        platform=platform.platform(),
        machine=platform.machine(),
        processor=processor_name(),
        cores=os.cpu_count() or 0,
        python=platform.python_version(),
        gpu=cuda.device_name(),
        compute_capability=cuda.local_target(),
        cuda_driver=cuda.driver_version(),
    )


#: Packages whose version can change what a bundle answers on a device, or how fast.
_ON_DEVICE = ("numpy", "onnx", "onnxruntime", "openvino", "pillow", "tensorrt-cu13", "tensorrt-rtx-cu13")


def device_versions() -> dict[str, str]:
    """Versions of what is installed here of the packages that a bundle runs with; nothing is imported."""
    known = {package.distribution: package.version for package in PACKAGES if package.distribution in _ON_DEVICE}
    found = {"patchslim": installed_version("patchslim"), "numpy": installed_version("numpy"), **known}
    return {name: version for name, version in sorted(found.items()) if version is not None}
