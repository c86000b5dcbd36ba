"""Models whose weights stay in their files: what is read and written, what is refused, and how much memory it takes."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm.layers
from onnx import TensorProto, helper, numpy_helper
from onnx_models import export_dense, plan_for
from timm.models.vision_transformer import VisionTransformer

from graph_passes import OnnxModel, files, save_model
from graph_passes.files import read_model
from graph_passes.proto import export_model, import_graph, with_shapes
from slimming.door import InputRejected

WIDTH = 32
IMAGE = np.random.default_rng(1).standard_normal((2, WIDTH)).astype(np.float32)


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)).astype(np.float32)


def stack(depth: int = 3, seed: int = 0, **changes: TensorProto) -> onnx.ModelProto:
    """MatMuls in a row with an Add behind each, weights ``w0`` (large) and ``b0`` (small); ``changes`` replace some."""
    initializers, nodes, name = [], [], "images"
    for index in range(depth):
        initializers += [
            numpy_helper.from_array(weight(seed + index), f"w{index}"),
            numpy_helper.from_array(weight(seed + index)[0], f"b{index}"),
        ]
        nodes += [
            helper.make_node("MatMul", [name, f"w{index}"], [f"m{index}"], name=f"matmul{index}"),
            helper.make_node("Add", [f"m{index}", f"b{index}"], [f"x{index}"], name=f"add{index}"),
        ]
        name = f"x{index}"
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "stack",
        [value("images", TensorProto.FLOAT, ["batch", WIDTH])],
        [value(name, TensorProto.FLOAT, ["batch", WIDTH])],
        [changes.get(tensor.name, tensor) for tensor in initializers],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key="made_by", value="a test")
    return model


def write(path: Path, model: onnx.ModelProto, form: str = "embedded") -> Path:
    """Save a model by the tools of onnx: weights as raw bytes, as numbers, or in a file beside it."""
    if form == "external":
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0, convert_attribute=True)
        return path
    if form == "typed":
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, values.ravel()))
    onnx.save(model, path)
    return path


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


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


MEMORY = """
import resource, sys
import numpy as np
from pathlib import Path
from graph_passes import load_model, save_model, slim
from graph_passes.files import read_model
from graph_passes.proto import export_model, import_graph, with_shapes
from slimming.plan import load_plan

def keep(source):
    model = read_model(source)
    return export_model(import_graph(with_shapes(model)), like=model)

def save(source):
    for external in (True, False):
        save_model(keep(source), source.with_name("out.onnx"), external=external)

def cut(source):
    plan = load_plan(source.with_suffix(".json"))
    save_model(slim(load_model(source), plan, precision="fp16").model, source.with_name("out.onnx"))

task, small, source, limit = globals()[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
task(small)  # what is imported late is imported now
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
try:
    np.ones(2 * limit, np.uint8)
except MemoryError:
    print("limited")
task(source)
"""


def wide(width: int, depth: int) -> onnx.ModelProto:
    """``stack`` with all weights of ``width x width`` in a file ``weights.bin`` that is not there."""
    model = stack(depth)
    for index, tensor in enumerate(model.graph.initializer):
        dims = [width] * len(tensor.dims)
        length = 4 * int(np.prod(dims))
        place = {"location": "weights.bin", "offset": index * 4 * width * width, "length": length}
        tensor.CopyFrom(TensorProto(name=tensor.name, data_type=1, dims=dims, data_location=TensorProto.EXTERNAL))
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[1].dim_value = width
    return model


def run_limited(task: str, small: Path, source: Path, limit: int) -> None:
    """Do a task of ``MEMORY`` with the model at ``source`` in ``limit`` bytes of private memory; ``small``: one to warm up."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, task, str(small), str(source), str(limit)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "limited" in done.stdout.split()


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited in the way of Linux")


@on_linux
@pytest.mark.parametrize("form", ["embedded", "external"])
def test_a_model_is_read_and_written_in_a_quarter_of_its_size(form: str, tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    rng = np.random.default_rng(0)
    with (tmp_path / "weights.bin").open("wb") as file:
        for _ in range(24):
            file.write(rng.integers(0, 2**30, 2**20, np.uint32).tobytes())
    onnx.save(wide(1024, 12), source)
    if form == "embedded":
        onnx.save(onnx.load(source), source)
        (tmp_path / "weights.bin").unlink()
    run_limited("save", write(tmp_path / "small.onnx", stack()), source, 12 * 2**20)
    assert (tmp_path / "out.onnx").stat().st_size > 48 * 2**20
    before, after = values(onnx.load(source)), values(onnx.load(tmp_path / "out.onnx"))
    for name, expected in before.items():
        np.testing.assert_array_equal(after[name], expected)


@on_linux
def test_a_model_of_three_gigabytes_passes_without_being_read(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(wide(16384, 3), source)
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(6 * 2**30)  # zeros that take no room on the disk
    assert read_model(source).nbytes > 3 * 2**30
    run_limited("keep", write(tmp_path / "small.onnx", stack()), source, 2**26)


@on_linux
def test_all_passes_take_less_memory_than_the_model_has(tmp_path: Path) -> None:
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        for name, width in (("small", 24), ("large", 768)):
            model = VisionTransformer(
                img_size=32, patch_size=8, embed_dim=width, depth=4, num_heads=3, mlp_ratio=2, num_classes=10
            )
            onnx.save(export_dense(model.eval()), tmp_path / f"{name}.onnx")
            plan_for(model, [list(range(17)), list(range(0, 17, 2)), [0, 4, 8], [0]]).save(tmp_path / f"{name}.json")
    finally:
        timm.layers.set_fused_attn(bool(before))
    size = (tmp_path / "large.onnx").stat().st_size
    assert size > 2**26
    run_limited("cut", tmp_path / "small.onnx", tmp_path / "large.onnx", size)
