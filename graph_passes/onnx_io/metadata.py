"""An ONNX model's metadata: keys that say what its images are, and adding entries to a file.

``Image.NominalPixelRange`` and its values are ONNX's own (docs/MetadataProps.md of the ONNX repository).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from graph_passes.onnx_io import protobuf_wire as wire

#: How far the values of a pixel reach, as the graph takes them.
PIXEL_RANGE = "Image.NominalPixelRange"
#: From 0 to 255, normalised in the graph.
FULL_RANGE = "NominalRange_0_255"
#: What is to be done to pixels outside of the graph; not there where the graph normalises them.
NORMALIZATION = "normalization"

_METADATA_PROPS, _KEY, _VALUE = 14, 1, 2  # field numbers in ModelProto and StringStringEntryProto


def add_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Add entries to the metadata of an ONNX file that has none of these keys, without reading it; raises ``OSError``.

    A protobuf message that follows another of its type in a file adds to the other's lists.
    """
    with path.open("ab") as file:
        for key, value in entries.items():
            file.write(_field(_METADATA_PROPS, _field(_KEY, key.encode()) + _field(_VALUE, value.encode())))


def _field(number: int, data: bytes) -> bytes:
    return wire.head(number, len(data)) + data
