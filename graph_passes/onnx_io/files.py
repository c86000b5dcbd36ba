"""Reads and writes ONNX files of any size; a file that cannot be used is refused by its name and the fault.

A file is mapped into memory, and its weights stay there until they are read: see ``graph_passes.onnx_io.model``.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped,unused-ignore]

from graph_passes.onnx_io import protobuf_wire as wire
from graph_passes.onnx_io.model import Bytes, OnnxModel, Weight, as_model, assemble, copy_fields, expected_nbytes
from patchslim.errors import InputRejected
from patchslim.records import atomic_path

#: A model that is larger gets its weights in a file beside it: protobuf ends at 2 GiB. In bytes.
PROTOBUF_LIMIT = 2**31 - 2**20

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # field numbers in ModelProto, GraphProto and TensorProto
_PAGE, _CACHE_LINE = 4096, 64  # weights in a data file start at multiples of these, the large ones of the first
_LARGE = 2**20
_LONGEST_MESSAGE = 1000
_FILES_SHOWN = 8  # of those beside a model, where one is missing


def read_model(path: Path) -> OnnxModel:
    """Read an ONNX file and its external data, whatever it computes.

    Raises ``InputRejected`` naming the file and the fault: missing, empty, truncated or corrupt, without nodes, or with
    external data that is missing or outside the model's folder.
    """
    try:
        data = _map(path)
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read: {error.strerror or error}") from error
    if not data.size:
        raise InputRejected(f"{path}: the file is empty")
    try:
        skeleton, initializers = _parse(data)
    except (DecodeError, RuntimeError, ValueError) as error:
        raise InputRejected(f"{path}: not an ONNX file, or a truncated or corrupt one ({error})") from error
    messages = [inner for outer in (skeleton, *(tensor for tensor, _ in initializers)) for inner in _messages(outer)]
    if not all(map(_is_utf8, messages)):
        raise InputRejected(f"{path}: a corrupt file: one of its names is not UTF-8 text")
    if not skeleton.graph.node:
        raise InputRejected(f"{path}: holds a graph with no nodes; not an ONNX model, or a truncated one")
    folder = _Folder(path.parent)
    try:
        for tensor in _messages(skeleton):
            if isinstance(tensor, onnx.TensorProto) and tensor.data_location == onnx.TensorProto.EXTERNAL:
                tensor.raw_data = folder.take(tensor).tobytes()
        return assemble(
            skeleton,
            [
                (tensor, folder.take(tensor) if tensor.data_location == onnx.TensorProto.EXTERNAL else data)
                for tensor, data in initializers
            ],
        )
    except InputRejected as error:
        raise InputRejected(f"{path}: {clipped(error)}") from error


def save_model(model: OnnxModel | onnx.ModelProto, path: Path, *, external: bool | None = None) -> None:
    """Write ``model`` whole or not at all; equal models give equal bytes. Raises ``OSError`` where it cannot be written.

    A model too large for one protobuf becomes two files: weights go to ``NAME-<start of their SHA-256>.data`` beside
    ``NAME.onnx``, so that the pair which ``path`` held stays whole until the new one is; then its data file is removed.
    ``external``: whether to write two files, whatever the size.
    """
    model = as_model(model)
    old = _data_file_of(path)
    if model.nbytes > PROTOBUF_LIMIT if external is None else external:
        new: Path | None = _save_pair(model, path)
    else:
        new = None
        with atomic_path(path) as part, part.open("wb") as file:
            for chunk in _embedded(model):
                file.write(chunk)
    if old is not None and old != new:
        old.unlink(missing_ok=True)


def clipped(error: Exception) -> str:
    """The error's message, cut off where a hostile file made it very long."""
    text = str(error)
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} ..."


def _map(path: Path) -> Bytes:
    """A file's bytes, mapped, not read; raises ``OSError``."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError("not a file")  # opening a pipe would wait for its other end
    with path.open("rb") as file:
        if not path.stat().st_size:
            return np.empty(0, np.uint8)
        return np.asarray(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def _parse(data: Bytes) -> tuple[onnx.ModelProto, list[tuple[onnx.TensorProto, Bytes | None]]]:
    """The model without its initializers, and these with their raw data apart, still in the file.

    Raises ``ValueError`` or ``DecodeError`` for what is no model.
    """
    view = data.data
    rest, graph, initializers = [], [], []
    for field in wire.fields(view, 0, len(view)):
        if (field.number, field.kind) != (_GRAPH, wire.BYTES):
            rest.append(view[field.start : field.end])
            continue
        for inner in wire.fields(view, field.value, field.end):
            if (inner.number, inner.kind) == (_INITIALIZER, wire.BYTES):
                initializers.append(_parse_tensor(view, inner))
            else:
                graph.append(view[inner.start : inner.end])
    skeleton = onnx.ModelProto()
    skeleton.ParseFromString(b"".join(rest))
    skeleton.graph.ParseFromString(b"".join(graph))
    return skeleton, initializers


def _parse_tensor(view: memoryview, field: wire.Field) -> tuple[onnx.TensorProto, Bytes | None]:
    """A tensor without its raw data, and the raw data, None where there is none."""
    rest, raw = [], None
    for inner in wire.fields(view, field.value, field.end):
        if (inner.number, inner.kind) == (_RAW_DATA, wire.BYTES):
            raw = np.asarray(view[inner.value : inner.end])
        else:
            rest.append(view[inner.start : inner.end])
    tensor = onnx.TensorProto()
    tensor.ParseFromString(b"".join(rest))
    return tensor, raw


class _Folder:
    """The files beside a model that hold external data; each is mapped once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._maps: dict[Path, Bytes] = {}

    def take(self, tensor: onnx.TensorProto) -> Bytes:
        """The bytes of ``tensor``, which then is as if it had never been elsewhere; raises ``InputRejected``."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        data, size = self._file(tensor.name, location), expected_nbytes(tensor)
        start, count = entries.get("offset", "0"), entries.get("length", str(size))
        try:
            offset, length = int(start), int(count)
        except ValueError:
            offset = length = -1
        if offset < 0 or length < 0 or offset + length > data.size or size not in (None, length):
            wanted = f"{count} bytes from {start} on, of {data.size}, for values of {size} bytes"
            raise InputRejected(f"the data of '{tensor.name}' cannot be read from '{location}': {wanted}")
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
        return data[offset : offset + length]

    def _file(self, name: str, location: str) -> Bytes:
        inside = location and not Path(location).is_absolute() and ".." not in re.split(r"[/\\]", location)
        try:
            target = (self._folder / location).resolve()
            if not inside or not target.is_relative_to(self._folder):
                raise InputRejected(f"the data of '{name}' is outside the model's folder: '{location}'")
            if not target.is_file():
                raise InputRejected(f"the data of '{name}' is missing: '{location}'{self._beside(location)}")
            if target not in self._maps:
                self._maps[target] = _map(target)
        except (OSError, ValueError) as error:
            raise InputRejected(f"the data of '{name}' cannot be read from '{location}': {error}") from error
        return self._maps[target]

    def _beside(self, location: str) -> str:
        """What lies where an external-data file was looked for, for a message: it may have been renamed."""
        place = (self._folder / location).parent
        try:
            names = sorted(entry.name for entry in place.iterdir() if entry.is_file() and entry.suffix != ".onnx")
        except OSError:
            return ""
        shown = ", ".join(f"'{name}'" for name in names[:_FILES_SHOWN]) or "no other file"
        more = f" and {len(names) - _FILES_SHOWN} more" if len(names) > _FILES_SHOWN else ""
        return f" is not in {place}; there is {shown}{more}: give the file back the name that the model has for it"


def _embedded(model: OnnxModel) -> Iterator[bytes | memoryview]:
    """The bytes of one ONNX file, weights behind everything else in the graph."""
    rest = onnx.ModelProto()
    copy_fields(model.skeleton, rest, "graph")
    graph = model.graph.SerializeToString(deterministic=True)
    records = [(_tensor_head(weight), weight.data.data) for weight in model.weights.values()]
    yield rest.SerializeToString(deterministic=True)
    yield wire.head(_GRAPH, len(graph) + sum(len(head) + data.nbytes for head, data in records))
    yield graph
    for head, data in records:
        yield head
        yield data


def _tensor_head(weight: Weight) -> bytes:
    """A weight as an initializer of the graph, up to where its values begin."""
    head = bytes(weight.head().SerializeToString(deterministic=True)) + wire.head(_RAW_DATA, weight.nbytes)
    return wire.head(_INITIALIZER, len(head) + weight.nbytes) + head


def _save_pair(model: OnnxModel, path: Path) -> Path:
    """Write the model and its data file, and return the latter's path."""
    digest = hashlib.sha256()
    for chunk in _data_chunks(model):
        digest.update(chunk)
    data_path = path.with_name(f"{path.stem}-{digest.hexdigest()[:8]}.data")
    proto = onnx.ModelProto()
    proto.CopyFrom(model.skeleton)
    for weight, offset in _offsets(model):
        tensor = weight.head()
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", data_path.name), ("offset", offset), ("length", weight.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        proto.graph.initializer.append(tensor)
    with atomic_path(path) as part, atomic_path(data_path) as data_part:  # the data file gets its name first
        with data_part.open("wb") as file:
            for chunk in _data_chunks(model):
                file.write(chunk)
        part.write_bytes(proto.SerializeToString(deterministic=True))
    return data_path


def _offsets(model: OnnxModel) -> Iterator[tuple[Weight, int]]:
    """Every weight and where it starts in the data file."""
    end = 0
    for weight in model.weights.values():
        start = end + -end % (_PAGE if weight.nbytes > _LARGE else _CACHE_LINE)
        yield weight, start
        end = start + weight.nbytes


def _data_chunks(model: OnnxModel) -> Iterator[bytes | memoryview]:
    """The bytes of the data file."""
    end = 0
    for weight, start in _offsets(model):
        yield bytes(start - end)
        yield weight.data.data
        end = start + weight.nbytes


def _data_file_of(path: Path) -> Path | None:
    """The data file that ``save_model`` wrote beside the model at ``path``, if that is how this model was written."""
    with contextlib.suppress(OSError, ValueError, TypeError, DecodeError):  # whatever else is there, it was not written so
        _, initializers = _parse(_map(path))
        named = re.compile(rf"{re.escape(path.stem)}-[0-9a-f]{{8}}\.data")
        for tensor, _ in initializers:
            for entry in tensor.external_data:
                if entry.key == "location" and named.fullmatch(entry.value):
                    return path.with_name(entry.value)
    return None


def _messages(message: Message) -> Iterator[Message]:
    """A protobuf message and every message in it."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for entry in value if isinstance(value, Sequence) else [value]:
                yield from _messages(entry)


def _is_utf8(message: Message) -> bool:
    """Whether every string of a protobuf message is text; protobuf hands out bytes where it is not."""
    return all(
        isinstance(entry, str)
        for field, value in message.ListFields()
        if field.type == field.TYPE_STRING
        for entry in (value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value])
    )
