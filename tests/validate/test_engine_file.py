"""Engine files that are what they are said to be; those that are not are in the corpus of hostile bundles."""

from __future__ import annotations

from pathlib import Path

import pytest

from validate.engine_file import check_engine

RTX = b"vtrt\0\0\0\0\2\0\0\0\0\0\0\0"


@pytest.mark.parametrize(
    ("backend", "data"),
    [
        ("tensorrt_rtx", RTX + (40).to_bytes(8, "little") + bytes(16)),
        ("tensorrt-rtx", RTX + (40).to_bytes(8, "little") + bytes(16)),
        ("tensorrt_rtx", RTX.replace(b"\2", b"\3") + bytes(24)),  # another version may keep its size elsewhere
        ("tensorrt", b"ftrt" + bytes(36)),
        ("openvino", b"anything"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_engines(tmp_path: Path, backend: str, data: bytes) -> None:
    (tmp_path / "a.engine").write_bytes(data)
    check_engine(tmp_path / "a.engine", backend)
