"""Model files that may not be trusted: truncated, damaged, contradicting themselves, pointing elsewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_passes import OnnxModel, save_model
from graph_passes.onnx_io.files import read_model
from graph_passes.onnx_io.graph_convert import with_shapes
from patchslim.errors import InputRejected
from tests.helpers.linear_stacks import WIDTH, stack


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    model = stack(2)
    data = model.SerializeToString()
    graph_ends = len(data) - len(model.opset_import[0].SerializeToString()) - 2 - 2 - model.metadata_props[0].ByteSize()
    path = tmp_path / "model.onnx"
    for cut in [*range(300), *range(300, graph_ends, 41), graph_ends - 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(InputRejected, match=re.escape(str(path))):
            read_model(path)


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_are_refused_or_harmless(seed: int, tmp_path: Path) -> None:
    data = bytearray(stack(2).SerializeToString())
    path, rng = tmp_path / "model.onnx", np.random.default_rng(seed)
    heads = [position for position in range(len(data)) if position < 300 or position > len(data) - 400]
    for _ in range(40):
        damaged = data.copy()
        for position in rng.choice(heads, 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            save_model(with_shapes(read_model(path)), tmp_path / "out.onnx")
        except InputRejected:
            assert not (tmp_path / "out.onnx").exists()
        else:
            (tmp_path / "out.onnx").unlink()


@pytest.mark.parametrize(
    "data",
    [b"\x3a\xff\xff\xff\xff\x0f", b"\x3a" + b"\xff" * 20, b"\x3a\x80", b"\x02\x00", b"\x0b", b"\x09\x01", b"\x3a\x02\x2a\x09"],
    ids=["long", "endless number", "cut number", "field 0", "group", "short fixed", "longer than its graph"],
)
def test_what_is_no_protobuf_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(InputRejected, match="not an ONNX file, or a truncated or corrupt one"):
        read_model(tmp_path / "model.onnx")


def tensor_of(dims: list[int], size: int, data_type: int = TensorProto.FLOAT) -> TensorProto:
    return TensorProto(name="w0", data_type=data_type, dims=dims, raw_data=bytes(size))


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        (tensor_of([WIDTH, WIDTH], 4000), r"4000 bytes of values, where FLOAT \[32, 32\] has 4096"),
        (tensor_of([WIDTH, WIDTH], 4100), "4100 bytes"),
        (tensor_of([2], 4), "4 bytes of values"),
        (tensor_of([2**40, 2**40], 4096), "4096 bytes of values"),
        (tensor_of([-WIDTH, -WIDTH], 4096), "is not one of a tensor"),
        (tensor_of([2**62] * 100_000, 4096), "is not one of a tensor"),
        (TensorProto(name="w0", data_type=TensorProto.FLOAT, dims=[2**40], float_data=[1.0]), "initializer 'w0'"),
        (TensorProto(name="w0", data_type=TensorProto.FLOAT, dims=[1], float_data=[1], raw_data=bytes(4)), "values twice"),
        (TensorProto(name="b0", data_type=TensorProto.FLOAT, dims=[1], raw_data=bytes(4)), "'b0': there are two"),
    ],
    ids=["short", "long", "small", "huge", "negative", "many dimensions", "huge typed", "twice", "one name"],
)
def test_values_that_contradict_the_shape_are_refused(tensor: TensorProto, fault: str, tmp_path: Path) -> None:
    proto = stack(w0=tensor)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputRejected, match=rf"model.onnx: .*{fault}"):
        read_model(tmp_path / "model.onnx")
    with pytest.raises(InputRejected, match=fault):
        OnnxModel.from_proto(proto)


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ({"location": "../secret"}, "outside the model's folder"),
        ({"location": "sub/../weights.bin"}, "outside the model's folder"),
        ({"location": "/etc/hostname"}, "outside the model's folder"),
        ({"location": "HERE/weights.bin"}, "outside the model's folder"),
        ({"location": "link"}, "outside the model's folder"),
        ({"location": "folder_link/secret"}, "outside the model's folder"),
        ({}, "outside the model's folder"),
        ({"location": "gone"}, "is missing"),
        ({"location": "sub"}, "is missing"),
        ({"location": "pipe"}, "is missing"),
        ({"location": "null\0byte"}, "cannot be read"),
        ({"location": "n" * 5000}, "cannot be read"),
        ({"location": "weights.bin", "offset": "4097"}, "cannot be read.*of 8192"),
        ({"location": "weights.bin", "offset": "-1"}, "cannot be read"),
        ({"location": "weights.bin", "offset": "many"}, "cannot be read"),
        ({"location": "weights.bin", "length": "4095"}, "cannot be read.*for values of 4096"),
        ({"location": "weights.bin", "length": "8192"}, "cannot be read"),
        ({"location": "weights.bin", "offset": str(2**70)}, "cannot be read"),
        ({"location": "empty"}, "cannot be read.*of 0"),
    ],
)
def test_external_data_is_refused_with_its_fault(entries: dict[str, str], fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(8192))
    (folder / "weights.bin").write_bytes(bytes(8192))
    (folder / "empty").touch()
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder_link").symlink_to(tmp_path)
    tensor = TensorProto(name="w0", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value.replace("HERE", str(folder)))
    constant = helper.make_node("Constant", [], ["unused"], value=tensor)
    in_attribute, in_function, sparse = stack(), stack(), stack()
    in_attribute.graph.node.append(constant)
    in_function.functions.add(name="function").node.append(constant)
    sparse.graph.sparse_initializer.add().indices.CopyFrom(tensor)
    for proto in (stack(w0=tensor), in_attribute, in_function, sparse):
        (folder / "model.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(InputRejected, match=rf"model.onnx: the data of 'w0' .*{fault}"):
            read_model(folder / "model.onnx")
    with pytest.raises(InputRejected, match="the data of 'w0' is in another file"):
        OnnxModel.from_proto(stack(w0=tensor))


def test_a_pipe_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(InputRejected, match="cannot be read"):
        read_model(tmp_path / "model.onnx")


def test_a_weight_of_the_wrong_shape_is_refused_without_its_values() -> None:
    wrong = numpy_helper.from_array(np.ones((WIDTH + 1, WIDTH), np.float32), "w1")
    with pytest.raises(InputRejected, match="not a valid ONNX graph"):
        with_shapes(stack(w1=wrong))
