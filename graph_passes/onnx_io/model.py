"""An ONNX model whose large weights stay in a mapped file or an array until their values are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped,unused-ignore]
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from patchslim.errors import InputRejected

Bytes = NDArray[np.uint8]

#: Larger initializers are kept outside the protobuf; in bytes.
LARGE = 1024
#: Shape inference reads such constants, so those up to this size stay in the protobuf; in bytes.
LARGE_INTEGERS = 2**20

_NUMPY_NAMES = {
    int(getattr(TensorProto, name.upper())): name
    for name in ("uint8", "int8", "uint16", "int16", "int32", "int64", "bool", "float16", "uint32", "uint64")
} | {int(TensorProto.FLOAT): "float32", int(TensorProto.DOUBLE): "float64"}
_NUMPY_NAMES |= {int(TensorProto.COMPLEX64): "complex64", int(TensorProto.COMPLEX128): "complex128"}
# NumPy knows these by the package ml_dtypes only.
_EXTENSION_NAMES = {
    int(TensorProto.BFLOAT16): "bfloat16",
    int(TensorProto.FLOAT8E4M3FN): "float8_e4m3fn",
    int(TensorProto.FLOAT8E4M3FNUZ): "float8_e4m3fnuz",
    int(TensorProto.FLOAT8E5M2): "float8_e5m2",
    int(TensorProto.FLOAT8E5M2FNUZ): "float8_e5m2fnuz",
}
_DATA_TYPES = {name: data_type for data_type, name in (_NUMPY_NAMES | _EXTENSION_NAMES).items()}
_INDICES = (int(TensorProto.INT32), int(TensorProto.INT64), int(TensorProto.BOOL))
_MOST_DIMENSIONS = 32  # as in NumPy 1
_VALUE_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


@dataclass(frozen=True, eq=False)
class Weight:
    """A large initializer: name, ONNX ``data_type``, shape, and its bytes in C order, which are not read before ``load``."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    data: Bytes

    @classmethod
    def from_array(cls, name: str, array: NDArray[np.generic]) -> Weight:
        """A weight that shares its memory with ``array`` if that is contiguous.

        Raises ``KeyError`` for a type of which a weight cannot be.
        """
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return cls(name, _DATA_TYPES[array.dtype.name], tuple(array.shape), data)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return int(self.data.nbytes)

    def load(self) -> NDArray[np.generic]:
        """The values, as a view of the file or array that holds them; bfloat16 and float8 in the types of ml_dtypes."""
        return self.data.view(numpy_type(self.data_type)).reshape(self.shape)

    def head(self) -> onnx.TensorProto:
        """Name, type and shape as an ONNX tensor without values."""
        return TensorProto(name=self.name, data_type=self.data_type, dims=self.shape)

    def to_tensor(self) -> onnx.TensorProto:
        """The weight as an ONNX tensor, values copied."""
        tensor = self.head()
        tensor.raw_data = self.data.tobytes()
        return tensor


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """A model in two parts: ``skeleton``, without its large initializers, and ``weights``, the large initializers by name.

    A file that weights come from may be replaced or deleted while the model is used, but not changed in place.
    """

    skeleton: onnx.ModelProto
    weights: dict[str, Weight]

    @property
    def graph(self) -> onnx.GraphProto:
        """The skeleton's graph: all nodes, inputs and outputs."""
        return self.skeleton.graph

    @property
    def nbytes(self) -> int:
        """Size of the model in bytes."""
        return int(self.skeleton.ByteSize()) + sum(weight.nbytes for weight in self.weights.values())

    @classmethod
    def from_proto(cls, model: onnx.ModelProto) -> OnnxModel:
        """The model with its weights copied into arrays.

        Raises ``InputRejected`` where an initializer's fields contradict each other, or its data is in another file.
        """
        skeleton = onnx.ModelProto()
        copy_fields(model, skeleton, "graph")
        copy_fields(model.graph, skeleton.graph, "initializer")
        return assemble(skeleton, (_without_data(tensor) for tensor in model.graph.initializer))

    def to_proto(self) -> onnx.ModelProto:
        """The whole model in one protobuf, weights copied; for models well below protobuf's limit of 2 GiB."""
        model = onnx.ModelProto()
        model.CopyFrom(self.skeleton)
        model.graph.initializer.extend(weight.to_tensor() for weight in self.weights.values())
        return model


def as_model(model: OnnxModel | onnx.ModelProto) -> OnnxModel:
    """``model`` itself, or what ``OnnxModel.from_proto`` makes of it."""
    return model if isinstance(model, OnnxModel) else OnnxModel.from_proto(model)


def assemble(skeleton: onnx.ModelProto, initializers: Iterable[tuple[onnx.TensorProto, Bytes | None]]) -> OnnxModel:
    """A model of ``skeleton``, which gets the small initializers, and the large ones as weights.

    ``initializers``: tensors without ``raw_data``, and its bytes apart (None where other fields hold the values).
    Raises ``InputRejected`` naming the initializer whose name is used twice, or whose size and shape contradict.
    """
    weights: dict[str, Weight] = {}
    names: set[str] = set()
    for tensor, data in initializers:
        if tensor.name in names:
            raise InputRejected(f"initializer '{tensor.name}': there are two of this name")
        names.add(tensor.name)
        _ensure_sound(tensor, data)
        weight = _as_weight(tensor, data)
        if weight is not None:
            weights[tensor.name] = weight
            continue
        if data is not None:
            tensor.raw_data = data.tobytes()
        skeleton.graph.initializer.append(tensor)
    return OnnxModel(skeleton, weights)


def numpy_type(data_type: int) -> np.dtype[np.generic]:
    """The NumPy type of an ONNX data type; raises ``KeyError`` for strings and types of less than a byte."""
    if data_type in _NUMPY_NAMES:
        return np.dtype(_NUMPY_NAMES[data_type])
    import ml_dtypes

    found: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, _EXTENSION_NAMES[data_type]))
    return found


def expected_nbytes(tensor: onnx.TensorProto) -> int | None:
    """Size in bytes that a tensor's values must have; None for types that are not whole bytes.

    Raises ``InputRejected`` for a shape that no tensor has.
    """
    shape = list(tensor.dims)
    if len(shape) > _MOST_DIMENSIONS or any(dim < 0 for dim in shape):
        raise InputRejected(f"initializer '{tensor.name}': its shape {shape[:_MOST_DIMENSIONS]} is not one of a tensor")
    return math.prod(shape) * numpy_type(tensor.data_type).itemsize if _is_known(tensor.data_type) else None


def is_large(data_type: int, nbytes: int) -> bool:
    """Whether such an initializer is kept as a ``Weight``."""
    return _is_known(data_type) and nbytes > (LARGE_INTEGERS if data_type in _INDICES else LARGE)


def is_storable(array: NDArray[np.generic]) -> bool:
    """Whether an array can be a ``Weight`` and is large enough to be one."""
    data_type = _DATA_TYPES.get(array.dtype.name)
    return data_type is not None and is_large(data_type, array.nbytes)


def copy_fields(source: Message, target: Message, left_out: str) -> None:
    """Copy every field of a protobuf message into an empty one, but for the one named ``left_out``."""
    for field, value in source.ListFields():
        if field.name == left_out:
            continue
        if isinstance(value, (bool, int, float, str, bytes)):
            setattr(target, field.name, value)
        elif hasattr(value, "CopyFrom"):
            getattr(target, field.name).CopyFrom(value)
        else:
            getattr(target, field.name).extend(value)


def _is_known(data_type: int) -> bool:
    return data_type in _NUMPY_NAMES or data_type in _EXTENSION_NAMES


def _without_data(tensor: onnx.TensorProto) -> tuple[onnx.TensorProto, Bytes | None]:
    if tensor.data_location == TensorProto.EXTERNAL:
        raise InputRejected(f"the data of '{tensor.name}' is in another file: read the model with load_model")
    head = onnx.TensorProto()
    copy_fields(tensor, head, "raw_data")
    return head, np.frombuffer(tensor.raw_data, np.uint8) if tensor.HasField("raw_data") else None


def _ensure_sound(tensor: onnx.TensorProto, data: Bytes | None) -> None:
    """Raise ``InputRejected`` unless an initializer's values are there once and as many as its shape says."""
    site, size = f"initializer '{tensor.name}'", expected_nbytes(tensor)
    if tensor.data_type not in TensorProto.DataType.values():
        raise InputRejected(f"{site}: its data type {tensor.data_type} is not one of ONNX")
    if data is None:
        return
    if any(getattr(tensor, field) for field in _VALUE_FIELDS):
        raise InputRejected(f"{site}: holds its values twice")
    if size is not None and size != data.nbytes:
        kind = f"{TensorProto.DataType.Name(tensor.data_type)} {list(tensor.dims)}"
        raise InputRejected(f"{site}: {data.nbytes} bytes of values, where {kind} has {size}")


def _as_weight(tensor: onnx.TensorProto, data: Bytes | None) -> Weight | None:
    """The initializer as a weight, or None for one that stays in the skeleton."""
    size = expected_nbytes(tensor)
    if size is None:
        return None
    large = is_large(tensor.data_type, size)
    if data is not None:
        return Weight(tensor.name, tensor.data_type, tuple(tensor.dims), data) if large else None
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise InputRejected(f"initializer '{tensor.name}': {error}") from error
    return Weight.from_array(tensor.name, array) if large and tensor.data_type in _NUMPY_NAMES else None
