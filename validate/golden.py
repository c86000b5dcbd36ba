"""``golden.npz``: real inputs with the original's and the slim model's logits, written reproducibly and read without trust."""

from __future__ import annotations

import dataclasses
import io
import math
import zipfile
from pathlib import Path

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected
from patchslim.files import read_bounded
from patchslim.records import atomic_path

#: An export writes 8 images; more than these are refused, which bounds the memory that a hostile bundle can ask for.
MAX_IMAGES = 256
MAX_BYTES = 1 << 30
_HEADER_BYTES = 4096
_DIRECTORY_BYTES = 4096  # four entries need 400
_END = b"PK\x05\x06"  # of a zip archive's directory
_NAMES = ("inputs", "labels", "original_logits", "slim_logits")


@dataclasses.dataclass(frozen=True)
class Golden:
    """Arrays of ``golden.npz`` for k images.

    ``inputs`` (k, channels, height, width) float32, preprocessed; ``labels`` (k,) int64, -1 where unknown; both logits
    (k, classes) float32, of the PyTorch original and of the PyTorch slim model.
    """

    inputs: Array
    labels: Array
    original_logits: Array
    slim_logits: Array


def write_golden(path: Path, golden: Golden) -> None:
    """Write ``golden.npz`` whole or not at all; the same arrays give the same bytes. Raises ``OSError``."""
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez(
            file,
            inputs=np.ascontiguousarray(golden.inputs, dtype=np.float32),
            labels=np.ascontiguousarray(golden.labels, dtype=np.int64),
            original_logits=np.ascontiguousarray(golden.original_logits, dtype=np.float32),
            slim_logits=np.ascontiguousarray(golden.slim_logits, dtype=np.float32),
        )


def most_bytes(input_size: tuple[int, int, int], classes: int) -> int:
    """Bytes that no ``golden.npz`` of a model of ``input_size`` (channels, height, width) and ``classes`` has more than."""
    return min(MAX_BYTES, MAX_IMAGES * (4 * math.prod(input_size) + 8 + 2 * 4 * classes) + len(_NAMES) * 2 * _HEADER_BYTES)


def read_golden(path: Path, input_size: tuple[int, int, int], classes: int) -> Golden:
    """Read ``golden.npz`` for a model of ``input_size`` (channels, height, width) and ``classes``.

    Every array's header is checked before its data is read, and no more is read than the header says: pickles and zip bombs are
    refused. Raises ``InputRejected`` naming the file and the fault.
    """
    return parse_golden(read_bounded(path, most_bytes(input_size, classes), "golden.npz"), path, input_size, classes)


def parse_golden(data: bytes, path: Path, input_size: tuple[int, int, int], classes: int) -> Golden:
    """``read_golden`` of bytes that were read from ``path`` already."""
    try:
        _check_directory(data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if sorted(entry.filename for entry in entries) != sorted(f"{name}.npy" for name in _NAMES):
                raise InputRejected(f"{path}: must hold the arrays {', '.join(_NAMES)} and nothing else")
            arrays = {name: _read(archive, name, input_size, classes) for name in _NAMES}
    except InputRejected:
        raise
    except Exception as error:  # what the parsers of zip, deflate and npy raise is not documented, and their input is foreign
        raise InputRejected(f"{path}: is not a readable golden.npz: {error or type(error).__name__}") from error
    golden = Golden(**arrays)
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) != 1:
        raise InputRejected(f"{path}: arrays have different numbers of images: {counts}")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputRejected(f"{path}: {name} holds NaN or infinite values")
    if golden.labels.min() < -1 or golden.labels.max() >= classes:
        raise InputRejected(f"{path}: labels must be in [0, {classes}), or -1 where unknown")
    return golden


def _check_directory(data: bytes) -> None:
    """Refuse an archive whose directory, which ``zipfile`` reads whole, is larger than four entries need."""
    end = data.rfind(_END)
    if end < 0:
        raise ValueError("it is no zip archive, or a truncated one")
    size = int.from_bytes(data[end + 12 : end + 16], "little")
    if size > _DIRECTORY_BYTES or data[max(0, end - 20) : end].startswith(b"PK\x06\x07"):
        raise ValueError(f"its directory has {size} bytes, and four arrays need fewer than {_DIRECTORY_BYTES}")


def _read(archive: zipfile.ZipFile, name: str, input_size: tuple[int, int, int], classes: int) -> Array:
    expected_tail = {"inputs": input_size, "labels": ()}.get(name, (classes,))
    expected_dtype = np.dtype("<i8" if name == "labels" else "<f4")
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{name}: npy format {version} is not (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=_HEADER_BYTES)
        if dtype != expected_dtype or fortran:
            raise ValueError(f"{name}: is {dtype}{' in Fortran order' if fortran else ''}, not {expected_dtype} in C order")
        if len(shape) != 1 + len(expected_tail) or shape[1:] != expected_tail or shape[0] < 1:
            raise ValueError(f"{name}: has shape {shape}, not (images, {', '.join(map(str, expected_tail))})")
        if shape[0] > MAX_IMAGES:
            raise ValueError(f"{name}: {shape[0]} images are more than the {MAX_IMAGES} allowed")
        size = math.prod(shape) * dtype.itemsize
        if size > MAX_BYTES:
            raise ValueError(f"{name}: {size} bytes are more than the {MAX_BYTES} allowed")
        data = stream.read(size)
        if len(data) != size or stream.read(1):  # the read past the end also has zipfile verify the CRC
            raise ValueError(f"{name}: its data is not the {size} bytes that its shape {shape} needs")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
