"""Files that are no ONNX model, or not the whole of one, and external data that points where it must not."""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping
from pathlib import Path

import onnx

from tests.helpers.attacks.registry import attack, damage, weight
from tests.helpers.attacks.vit import tiny_vit


@attack("the file is empty")
def empty(folder: Path) -> bytes:
    return b""


@attack("cannot be read: No such file")
def missing(folder: Path) -> None:
    return None


@attack("cannot be read: Is a directory")
def a_folder(folder: Path) -> None:
    (folder / "model.onnx").mkdir()


@attack("cannot be read: not a file", alone=True)
def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "model.onnx")


@attack("cannot be read")
def a_link_to_itself(folder: Path) -> None:
    (folder / "model.onnx").symlink_to("model.onnx")


@attack("not an ONNX file, or a truncated or corrupt one")
def truncated(folder: Path) -> bytes:
    data = tiny_vit().SerializeToString()
    return data[: len(data) // 2]


@attack("not an ONNX file, or a truncated or corrupt one")
def last_byte_missing(folder: Path) -> bytes:
    return tiny_vit().SerializeToString()[:-1]


@attack("not an ONNX file, or a truncated or corrupt one")
def twice_in_a_row_and_cut(folder: Path) -> bytes:
    return tiny_vit().SerializeToString() + tiny_vit().SerializeToString()[:500]


@attack("initializer '.*': there are two of this name|not a valid ONNX graph")
def twice_in_a_row(folder: Path) -> bytes:
    return tiny_vit().SerializeToString() * 2  # protobuf merges the two


@attack("not an ONNX file")
def text(folder: Path) -> bytes:
    return b'{"model": "vit"}' * 100


@attack("not an ONNX file")
def zeros(folder: Path) -> bytes:
    return bytes(10_000)


@attack("not an ONNX file")
def compressed(folder: Path) -> bytes:
    return gzip.compress(tiny_vit().SerializeToString())


@attack("not an ONNX file")
def a_length_beyond_the_file(folder: Path) -> bytes:
    return b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + tiny_vit().SerializeToString()


@attack("not an ONNX file")
def a_number_without_end(folder: Path) -> bytes:
    return b"\x08" + b"\xff" * 1000


@attack("a corrupt file")
def a_tensor_file(folder: Path) -> bytes:
    return onnx.TensorProto(dims=[2], data_type=onnx.TensorProto.FLOAT, float_data=[1, 2]).SerializeToString()


@damage("holds a graph with no nodes")
def no_nodes(model: onnx.ModelProto) -> None:
    del model.graph.node[:]


@attack("one of its names is not UTF-8 text")
def a_name_that_is_no_text(folder: Path) -> bytes:
    return tiny_vit().SerializeToString().replace(b"logits", b"log\xff\xfes")


def outside(model: onnx.ModelProto, entries: Mapping[str, str], name: str = "wq0") -> onnx.ModelProto:
    """The model with the values of one initializer elsewhere."""
    tensor = weight(model, name)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


def secret(folder: Path) -> Path:
    """A file of the right size outside the model's folder."""
    path = folder.parent / "secret"
    path.write_bytes(b"s" * 256)
    return path


@attack("data of 'wq0' is outside the model's folder: '../secret'")
def data_above(folder: Path) -> onnx.ModelProto:
    secret(folder)
    return outside(tiny_vit(), {"location": "../secret"})


@attack("outside the model's folder")
def data_above_in_a_small_tensor(folder: Path) -> onnx.ModelProto:
    secret(folder)
    return outside(tiny_vit(), {"location": "../secret", "length": "4"}, "root")


@attack("outside the model's folder")
def data_above_by_a_backslash(folder: Path) -> onnx.ModelProto:
    secret(folder)
    return outside(tiny_vit(), {"location": "..\\secret"})


@attack("outside the model's folder")
def data_above_and_back(folder: Path) -> onnx.ModelProto:
    (folder / "data").write_bytes(bytes(256))
    return outside(tiny_vit(), {"location": f"../{folder.name}/data"})


@attack("outside the model's folder")
def data_by_an_absolute_path(folder: Path) -> onnx.ModelProto:
    return outside(tiny_vit(), {"location": str(secret(folder))})


@attack("outside the model's folder")
def data_by_a_link(folder: Path) -> onnx.ModelProto:
    (folder / "data").symlink_to(secret(folder))
    return outside(tiny_vit(), {"location": "data"})


@attack("outside the model's folder")
def data_in_a_linked_folder(folder: Path) -> onnx.ModelProto:
    secret(folder)
    (folder / "up").symlink_to(folder.parent)
    return outside(tiny_vit(), {"location": "up/secret"})


@attack("outside the model's folder")
def data_nowhere(folder: Path) -> onnx.ModelProto:
    return outside(tiny_vit(), {})


@attack("data of 'wq0' is missing: 'gone'")
def data_missing(folder: Path) -> onnx.ModelProto:
    return outside(tiny_vit(), {"location": "gone"})


@attack("data of 'wq0' is missing", alone=True)
def data_in_a_pipe(folder: Path) -> onnx.ModelProto:
    os.mkfifo(folder / "data")
    return outside(tiny_vit(), {"location": "data"})


@attack("data of 'wq0' cannot be read from 'data': 256 bytes from 1 on, of 256")
def data_behind_the_end(folder: Path) -> onnx.ModelProto:
    (folder / "data").write_bytes(bytes(256))
    return outside(tiny_vit(), {"location": "data", "offset": "1"})


@attack("data of 'wq0' cannot be read from 'data': 255 bytes")
def data_of_another_length(folder: Path) -> onnx.ModelProto:
    (folder / "data").write_bytes(bytes(256))
    return outside(tiny_vit(), {"location": "data", "length": "255"})


@attack("data of 'wq0' cannot be read")
def data_at_a_huge_offset(folder: Path) -> onnx.ModelProto:
    (folder / "data").write_bytes(bytes(256))
    return outside(tiny_vit(), {"location": "data", "offset": str(2**64)})


@attack("data of 'wq0' cannot be read")
def data_at_an_endless_offset(folder: Path) -> onnx.ModelProto:
    (folder / "data").write_bytes(bytes(256))
    return outside(tiny_vit(), {"location": "data", "offset": "9" * 100_000})


@attack("outside the model's folder")
def data_above_in_an_attribute(folder: Path) -> onnx.ModelProto:
    secret(folder)
    model = outside(tiny_vit(), {"location": "../secret"})
    value = onnx.helper.make_node("Constant", [], ["wq0"], value=weight(model, "wq0"))
    model.graph.initializer.remove(weight(model, "wq0"))
    model.graph.node.insert(0, value)
    return model
