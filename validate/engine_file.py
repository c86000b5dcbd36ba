"""An engine file's header: an engine runs only where it was built for, so seldom here, but what it is can be seen anywhere."""

from __future__ import annotations

import re
from pathlib import Path

from patchslim.errors import InputRejected
from patchslim.files import open_regular

#: How the serialised plans of a backend begin; TensorRT's first letter changed with its releases (``ptrt``, ``ftrt``). By the
#: names that an export gives; a hyphen in the place of the underscore is the same backend.
_MAGIC = {"tensorrt_rtx": re.compile(rb"vtrt"), "tensorrt": re.compile(rb"[a-z]trt")}
_HEAD = 24  # bytes. A TensorRT-RTX plan has a version at 8 and its own size at 16, little-endian: seen in release 1.7.1
_RTX_VERSION = 2


def check_engine(path: Path, backend: str) -> None:
    """Refuse an engine file that is empty, or that is not the backend's; raises ``InputRejected`` naming the fault.

    A backend whose files are not known is only asked for one that is not empty. Nothing is loaded.
    """
    try:
        with open_regular(path, follow=False) as file:
            head = file.read(_HEAD)
            size = file.seek(0, 2)
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read as an engine: {error.strerror or error}") from error
    if not size:
        raise InputRejected(f"{path}: is empty, and the manifest names it as an engine for {backend}")
    known = backend.replace("-", "_")
    if known == "openvino" and path.suffix == ".xml" and not head.startswith((b"<?xml", b"<net")):
        raise InputRejected(f"{path}: is no IR of OpenVINO: it begins with {head[:4]!r}, not an XML declaration")
    magic = _MAGIC.get(known)
    if magic is None:
        return
    if len(head) < _HEAD or not magic.match(head):
        raise InputRejected(f"{path}: is no engine of {backend}: it begins with {head[:4]!r}, not {magic.pattern.decode()!r}")
    version, stated = (int.from_bytes(head[start : start + 8], "little") for start in (8, 16))
    if known == "tensorrt_rtx" and version == _RTX_VERSION and stated != size:
        raise InputRejected(f"{path}: is a damaged engine of {backend}: has {size} bytes, and its header says {stated}")
