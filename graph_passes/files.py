"""Reads and writes ONNX files; what cannot be used is refused with the file's name and the fault."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]
from onnx import external_data_helper

from slimming.door import InputRejected, atomic_path


def load_model(path: Path) -> onnx.ModelProto:
    """Read a Vision Transformer from an ONNX file, with its external data.

    Raises ``InputRejected`` naming the file and the fault: missing, empty, truncated or corrupt, without nodes, external data
    missing or outside the model's folder, not a valid graph, or not a Vision Transformer of a form that the passes understand.
    """
    from graph_passes.match import MatchFailure
    from graph_passes.proto import import_graph, with_shapes
    from graph_passes.structure import find_structure

    model = read_model(path)
    try:
        find_structure(import_graph(with_shapes(model)))
    except InputRejected as error:
        raise InputRejected(f"{path}: {error}") from error
    except MatchFailure as failure:
        raise InputRejected(f"{path}: not a Vision Transformer that the passes understand: {failure}") from failure
    except Exception as error:  # a hostile file can trip the readers anywhere; the cause stays chained
        raise InputRejected(f"{path}: cannot be read as a graph: {type(error).__name__}: {error}") from error
    return model


def read_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file and its external data, whatever it computes; raises ``InputRejected``."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read: {error.strerror or error}") from error
    if not data:
        raise InputRejected(f"{path}: the file is empty")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, RuntimeError, ValueError) as error:
        raise InputRejected(f"{path}: not an ONNX file, or a truncated or corrupt one ({error})") from error
    if not _is_utf8(model):
        raise InputRejected(f"{path}: a corrupt file: one of its names is not UTF-8 text")
    if not model.graph.node:
        raise InputRejected(f"{path}: holds a graph with no nodes; not an ONNX model, or a truncated one")
    _load_external_data(model, path)
    return model


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model`` whole or not at all; equal models give equal bytes. Raises ``OSError``."""
    with atomic_path(path) as part:
        part.write_bytes(model.SerializeToString(deterministic=True))


def _load_external_data(model: onnx.ModelProto, path: Path) -> None:
    folder = path.parent.resolve()
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        target = (folder / location).resolve()
        if not location or not target.is_relative_to(folder):
            raise InputRejected(f"{path}: the data of '{tensor.name}' is outside the model's folder: '{location}'")
        if not target.is_file():
            raise InputRejected(f"{path}: the data of '{tensor.name}' is missing: '{location}'")
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except Exception as error:  # onnx raises many kinds here, for what are all faults of the file
            raise InputRejected(f"{path}: the data of '{tensor.name}' cannot be read from '{location}': {error}") from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _is_utf8(message: Any) -> bool:
    """Whether every string in a protobuf message is text; protobuf hands out bytes where it is not."""
    for field, value in message.ListFields():
        entries = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
        if field.type == field.TYPE_STRING and not all(isinstance(entry, str) for entry in entries):
            return False
        if field.type == field.TYPE_MESSAGE and not all(_is_utf8(entry) for entry in entries):
            return False
    return True


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in a graph: initializers and attributes, subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)
            for subgraph in attribute.graphs:
                yield from _tensors(subgraph)
