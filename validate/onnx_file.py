"""An ONNX file's structure, checked before anything runs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from patchslim.errors import InputRejected
from patchslim.files import read_bounded
from validate.fields import plain_path

#: A protobuf message cannot be larger; weights beyond that are in files beside it.
MAX_ONNX_BYTES = (1 << 31) - 1
_IN_MEMORY = "_ORT_MEM_ADDR_"  # ONNX Runtime takes the offset of weights "stored" there for an address


def check_onnx(path: Path, allowed_data: set[str] | None = None) -> None:
    """Refuse an ONNX file that does not parse, holds no nodes, or keeps weights in files outside ``allowed_data``.

    ``allowed_data`` are names relative to the ONNX file's folder, None for any file below it.
    Raises ``InputRejected`` naming the file and the fault.
    """
    check_onnx_bytes(read_bounded(path, MAX_ONNX_BYTES, "ONNX file"), path, allowed_data)


def check_onnx_bytes(data: bytes, path: Path, allowed_data: set[str] | None = None) -> set[str]:
    """``check_onnx`` of bytes that were read from ``path`` already; returns the names of the files that its weights are in."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError) as error:
        raise InputRejected(f"{path}: is not a readable ONNX file: {error}") from error
    needed: set[str] = set()
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
        if _IN_MEMORY in location:
            raise InputRejected(f"{path}: weight {tensor.name!r} is an address in memory, which only a running program has")
        if allowed_data is not None and location not in allowed_data:
            raise InputRejected(f"{path}: weight {tensor.name!r} is stored in {location}, which the manifest does not list")
        needed.add(location)
    return needed


def beside(onnx: str, files: Iterable[str]) -> dict[str, str]:
    """The ``files`` of a bundle that the weights of its file ``onnx`` may be in, by their names as that file gives them."""
    base = PurePosixPath(onnx).parent
    paths = [PurePosixPath(file) for file in files]
    return {str(path.relative_to(base)): str(path) for path in paths if path.is_relative_to(base)}


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
