"""An ONNX file's structure, checked before anything runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchslim.errors import InputRejected
from validate.manifest import plain_path


def check_onnx(path: Path, allowed_data: set[str] | None = None) -> None:
    """Refuse an ONNX file that does not parse, holds no nodes, or keeps weights in files outside ``allowed_data``.

    ``allowed_data`` are names relative to the ONNX file's folder, None for any file below it.
    Raises ``InputRejected`` naming the file and the fault.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise InputRejected(f"{path}: is not a readable ONNX file: {error}") from error
    if not model.graph.node:
        raise InputRejected(f"{path}: is empty or truncated: its graph has no nodes")
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        try:
            plain_path(location)
        except ValueError as error:
            raise InputRejected(f"{path}: weight {tensor.name!r} is stored outside the bundle: {error}") from error
        if allowed_data is not None and location not in allowed_data:
            raise InputRejected(f"{path}: weight {tensor.name!r} is stored in {location}, which the manifest does not list")


def _tensors(message: Any) -> Iterator[Any]:
    """Every stored tensor of an ONNX message: initialisers, sparse ones, attributes, subgraphs and functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in [value] if hasattr(value, "ListFields") else value:
            yield from _tensors(child)
