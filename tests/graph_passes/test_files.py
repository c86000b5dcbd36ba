"""Models whose weights stay in their files: what is read and written, and that nothing is lost on the way."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_passes import OnnxModel, save_model
from graph_passes.onnx_io import files
from graph_passes.onnx_io.files import read_model
from graph_passes.onnx_io.graph_convert import export_model, import_graph, with_shapes
from tests.helpers.linear_stacks import IMAGE, WIDTH, stack, values, weight, write


def answer(path: Path) -> np.ndarray:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"images": IMAGE})[0]


@pytest.mark.parametrize("form", ["embedded", "typed", "external"])
@pytest.mark.parametrize("external", [False, True])
def test_a_model_comes_back_as_it_was(form: str, external: bool, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.onnx", stack(), form), tmp_path / "out.onnx"
    model = read_model(source)
    assert list(model.weights) == ["w0", "w1", "w2"]
    assert [tensor.name for tensor in model.graph.initializer] == ["b0", "b1", "b2"]
    save_model(model, target, external=external)
    onnx.checker.check_model(str(target), full_check=True)
    before, after = onnx.load(source), onnx.load(target)
    assert values(after).keys() == values(before).keys()
    for name, expected in values(before).items():
        np.testing.assert_array_equal(values(after)[name], expected)
    for proto in (before, after):
        del proto.graph.initializer[:]
    assert before == after
    np.testing.assert_array_equal(answer(target), answer(source))
    assert len(list(tmp_path.glob("out-*.data"))) == external


@pytest.mark.parametrize("form", ["embedded", "external"])
def test_weights_are_views_of_the_file(form: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in.onnx", stack(), form)
    loaded = read_model(path).weights["w1"].load()
    assert not loaded.flags.owndata
    assert not loaded.flags.writeable
    holder = path if form == "embedded" else tmp_path / "weights.bin"
    with holder.open("r+b") as file:  # what is written to the file is seen in the array
        file.seek(holder.read_bytes().index(loaded.tobytes()))
        file.write(np.float32(42).tobytes())
    assert loaded[0, 0] == 42


def test_a_protobuf_becomes_a_model_and_back() -> None:
    proto = stack()
    before = proto.SerializeToString()
    model = OnnxModel.from_proto(proto)
    assert proto.SerializeToString() == before
    assert values(model.to_proto()).keys() == values(proto).keys()
    assert 3 * WIDTH * WIDTH * 4 < model.nbytes < len(before) + 100
    onnx.checker.check_model(model.to_proto(), full_check=True)


def test_a_model_above_the_limit_gets_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OnnxModel.from_proto(stack())
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", model.nbytes)
    save_model(model, tmp_path / "one.onnx")
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", model.nbytes - 1)
    save_model(model, tmp_path / "two.onnx")
    assert len(list(tmp_path.iterdir())) == 3
    (data,) = tmp_path.glob("two-*.data")
    entries = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(tmp_path / "two.onnx", load_external_data=False).graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    ]
    assert [entry["location"] for entry in entries] == [data.name] * 3
    assert all(int(entry["offset"]) % 64 == 0 for entry in entries)
    np.testing.assert_array_equal(answer(tmp_path / "two.onnx"), answer(tmp_path / "one.onnx"))


def test_weights_above_a_mebibyte_start_at_a_page(tmp_path: Path) -> None:
    w0, w2 = (numpy_helper.from_array(np.zeros((513, 512), np.float32), name) for name in ("w0", "w2"))
    save_model(stack(3, w0=w0, w2=w2), tmp_path / "m.onnx", external=True)
    offsets = [
        int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
        for tensor in onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
        if tensor.external_data
    ]
    assert offsets == [0, 513 * 2048, 258 * 4096]  # w1 has 4096 bytes


@pytest.mark.parametrize("external", [False, True])
def test_equal_models_give_equal_bytes(external: bool, tmp_path: Path) -> None:
    contents = []
    source = write(tmp_path / "in.onnx", stack())
    for number, model in enumerate((read_model(source), OnnxModel.from_proto(stack()), stack())):
        (tmp_path / str(number)).mkdir()
        save_model(model, tmp_path / str(number) / "model.onnx", external=external)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()})
    assert contents[0] == contents[1] == contents[2]
    save_model(read_model(tmp_path / "0" / "model.onnx"), tmp_path / "3" / "model.onnx", external=external)
    assert {path.name: path.read_bytes() for path in (tmp_path / "3").iterdir()} == contents[0]


def test_replacing_a_pair_removes_its_data_file_only(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    others = ["model-0123456.data", "model-01234567.data", "model-0123456g.data", "other-01234567.data", "weights.bin"]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    save_model(stack(seed=0), path, external=True)
    first = set(os.listdir(tmp_path))
    save_model(stack(seed=7), path, external=True)
    second = set(os.listdir(tmp_path))
    assert len(first) == len(second) == len(others) + 2
    assert len(first - second) == 1
    np.testing.assert_array_equal(values(onnx.load(path))["w0"], weight(7))
    save_model(stack(seed=7), path, external=True)
    assert set(os.listdir(tmp_path)) == second
    save_model(stack(seed=7), path)
    assert set(os.listdir(tmp_path)) == {*others, "model.onnx"}
    write(path, stack(), "external")  # somebody else's data file stays
    save_model(stack(), path)
    assert set(os.listdir(tmp_path)) == {*others, "model.onnx"}


@pytest.mark.parametrize("external", [False, True])
def test_a_pair_stays_whole_when_writing_fails(external: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_model(stack(seed=0), path, external=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # as on a disk that is full
    try:
        with pytest.raises(OSError, match="File too large"):
            save_model(stack(seed=7), path, external=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("form", ["embedded", "external"])
@pytest.mark.parametrize("external", [False, True])
def test_a_model_is_written_over_its_own_input(form: str, external: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", stack(), form)
    model = read_model(path)
    for _ in range(2):  # the second time over what was written from the same maps
        save_model(model, path, external=external)
        for name, expected in values(stack()).items():
            np.testing.assert_array_equal(values(onnx.load(path))[name], expected)
        np.testing.assert_array_equal(model.weights["w1"].load(), weight(1))
        model = read_model(path)


@pytest.mark.parametrize("data_type", ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"])
@pytest.mark.parametrize("read", [False, True])
def test_types_that_numpy_lacks_survive_the_passes(data_type: str, read: bool, tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((WIDTH, 2 * WIDTH)).astype(getattr(ml_dtypes, data_type))
    tensor = numpy_helper.from_array(array, "w0")
    proto = stack(1)
    proto.graph.initializer[0].name = "unused"
    proto.graph.initializer.append(tensor)
    proto.graph.node.insert(0, helper.make_node("Cast", ["w0"], ["cast"], name="cast", to=TensorProto.FLOAT))
    proto.graph.node[1].input[1] = "cast"
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones(2 * WIDTH, np.float32), "b0"))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2 * WIDTH
    model = read_model(write(tmp_path / "model.onnx", proto))
    graph = import_graph(with_shapes(model))
    if read:
        np.testing.assert_array_equal(graph.tensors()["w0"].values, array)
    exported = export_model(graph, like=model)
    assert list(exported.weights) == ["w0"]  # what nothing reads is gone
    (kept,) = [kept for kept in exported.to_proto().graph.initializer if kept.name == "w0"]
    assert kept == tensor
    assert exported.skeleton.metadata_props == proto.metadata_props


def test_only_what_a_pass_asks_for_is_read_and_its_arrays_are_not_copied() -> None:
    model = OnnxModel.from_proto(stack())
    graph = import_graph(with_shapes(model))
    tensors = graph.tensors()
    made = np.zeros((WIDTH, WIDTH), np.float32)
    tensors["w1"].values = made
    tensors["w2"].name = "renamed"
    exported = export_model(graph, like=model)
    assert list(exported.weights) == ["w0", "w1", "renamed"]
    assert np.shares_memory(exported.weights["w1"].load(), made)
    assert exported.weights["w0"].data is model.weights["w0"].data
    assert exported.weights["renamed"].data is model.weights["w2"].data
    assert values(exported.to_proto()).keys() == {"w0", "w1", "renamed", "b0", "b1", "b2"}
    assert not isinstance(tensors["w0"]._values, np.ndarray)


def test_a_weight_that_a_subgraph_reads_survives() -> None:
    proto = stack()
    branches = {
        name: helper.make_graph(
            [helper.make_node("MatMul", ["m2", "w2"], [f"{name}.out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None)],
        )
        for name in ("then_branch", "else_branch")
    }
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.node.append(helper.make_node("If", ["yes"], ["chosen"], name="if", **branches))
    proto.graph.output[0].name = "chosen"
    before = ort.InferenceSession(proto.SerializeToString()).run(None, {"images": IMAGE})[0]
    model = OnnxModel.from_proto(proto)
    exported = export_model(import_graph(with_shapes(model)), like=model).to_proto()
    np.testing.assert_array_equal(ort.InferenceSession(exported.SerializeToString()).run(None, {"images": IMAGE})[0], before)


def test_weights_that_an_old_model_lists_as_inputs_are_read(tmp_path: Path) -> None:
    proto = stack()
    proto.ir_version = 3
    proto.opset_import[0].version = 8
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    path = write(tmp_path / "old.onnx", proto)
    model = read_model(path)
    exported = export_model(import_graph(with_shapes(model)), like=model)
    assert [value.name for value in exported.graph.input] == ["images"]
    save_model(exported, tmp_path / "new.onnx")
    np.testing.assert_array_equal(answer(tmp_path / "new.onnx"), answer(path))
