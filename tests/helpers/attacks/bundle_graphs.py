"""Attacks on a bundle's ONNX files: none that parse, weights from elsewhere, wrong answers, and traps for time and memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.attacks.bundle_arrays import in_arrays
from tests.helpers.attacks.bundles import add, attack, seal
from tests.helpers.bundles import CLASSES, SIZE, weight, write_onnx

Write = Callable[[Path], Any]


def in_graph(name: str, code: int, *words: str, **more: Any) -> Callable[[Write], Write]:
    """Add a function that writes another model to the path that it is given; the bundle then holds that graph alone."""

    def register(write: Write) -> Write:
        def damage(bundle: Path) -> None:
            (bundle / "model-fp16.onnx").unlink()
            write(bundle / "model.onnx")
            seal(bundle, lambda record: record["onnx"].pop(1))

        add(name, code, ("model.onnx", *words), damage, **more)
        return write

    return register


for _data, _words in ((b"", ("empty or truncated",)), (b"not onnx at all", ("not a readable ONNX file",))):
    in_graph(f"a graph that is {_data!r}", 3, *_words)(lambda path, data=_data: path.write_bytes(data))  # type: ignore[misc]


@in_graph("a graph cut off", 3)
def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@in_graph("a graph nested without end", 3, "not a readable ONNX file")
def nested(path: Path) -> None:
    """A graph in an attribute of a node of a graph, and so on: Python and C++ would run out of stack."""
    data = b""
    for _ in range(3000):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            data = tag + _varint(len(data)) + data
    path.write_bytes(b"\x08\x0a\x3a" + _varint(len(data)) + data)


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


in_graph("a graph of fewer classes", 3)(lambda path: write_onnx(path, weight()[:, :4]))
in_graph("a graph of a fixed batch", 3, "inputs and outputs")(lambda path: write_onnx(path, weight(), batch=4))


@in_graph("a graph of an operator that there is not", 3, "ONNX Runtime cannot load it")
def unknown_operator(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[0].domain = "of.nobody"
    model.opset_import.append(helper.make_opsetid("of.nobody", 1))
    onnx.save(model, path)


@in_graph("weights above the bundle", 3, "outside the bundle")
def weights_above(path: Path) -> None:
    write_onnx(path, weight(), external="../weights.bin")
    shutil.move(path.parent / "weights.bin", path.parent.parent / "weights.bin")


@in_graph("weights by an absolute path", 3, "outside the bundle")
def weights_anywhere(path: Path) -> None:
    write_onnx(path, weight(), external="/etc/passwd")
    (path.parent / "weights.bin").unlink()


in_graph("weights that are not listed", 3, "does not list")(lambda path: write_onnx(path, weight(), external="elsewhere.bin"))


@in_graph("weights at an address in memory", 3, "an address in memory")
def weights_in_memory(path: Path) -> None:
    (path.parent / "*").mkdir()
    (path.parent / "*" / "_ORT_MEM_ADDR_").write_bytes(bytes(9))
    write_onnx(path, weight(), external="*/_ORT_MEM_ADDR_")


@in_graph("weights beyond the end of their file", 3)
def weights_behind_the_end(path: Path) -> None:
    write_onnx(path, weight(), external="weights.bin")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data.add(key="offset", value=str(1 << 40))
    path.write_bytes(model.SerializeToString())


in_graph("a graph that answers wrongly", 5, "max error")(lambda path: write_onnx(path, weight() * np.float32(1.1)))


@in_graph("a graph of NaN", 5, "NaN or infinite")
def not_numbers(path: Path) -> None:
    broken = weight()
    broken[0, 0] = np.inf
    write_onnx(path, broken)


@attack(5, "model.onnx", "agreement")
def a_graph_of_other_classes_within_the_tolerance(bundle: Path) -> None:
    """Logits so small that any others are within it."""
    small = np.float32(1e-6)
    in_arrays(lambda arrays: arrays.update({name: arrays[name] * small for name in ("original_logits", "slim_logits")}))(bundle)
    write_onnx(bundle / "model.onnx", weight(seed=2) * small)
    (bundle / "model-fp16.onnx").unlink()
    seal(bundle, lambda record: record["onnx"].pop(1))


def write_trap(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> None:
    """A classifier to whose logits ``nodes`` add a scalar, ``extra``."""
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(
        [
            *nodes,
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["product"]),
            helper.make_node("Add", ["product", "extra"], ["logits"]),
        ],
        "trap",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [*tensors, numpy_helper.from_array(weight(), "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@in_graph("a loop of a billion trips", 3, "did not answer within 2 s", timeout=2.0)
def write_endless(path: Path) -> None:
    """A loop of 10^9 trips that keeps a scalar."""
    scalar = helper.make_tensor_value_info("kept", TensorProto.FLOAT, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Sin", ["kept"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            scalar,
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, []),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["start"], keepdims=0),
        helper.make_node("Loop", ["trips", "true", "start"], ["extra"], body=body),
    ]
    write_trap(path, nodes, {"trips": np.array(10**9), "true": np.array(True)})


@in_graph("few bytes that become 256 GiB", 3, "alloc")
def write_bomb(path: Path) -> None:
    """Few bytes that become 256 GiB."""
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["start"], keepdims=0),
        helper.make_node("Expand", ["start", "shape"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["extra"], keepdims=0),
    ]
    write_trap(path, nodes, {"shape": np.array([1 << 18, 1 << 18])})


@in_graph("few bytes that become 64 GiB while the model is loaded", 3)
def write_constant_bomb(path: Path) -> None:
    """What ONNX Runtime folds before the model runs."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["extra"], keepdims=0),
    ]
    write_trap(path, nodes, {"shape": np.array([1 << 17, 1 << 17])})


@in_graph("a graph that answers with too many numbers", 3, "not (images, classes)")
def too_many_numbers(path: Path) -> None:
    """The shape that it states is the manifest's, and what it gives is another."""
    write_onnx(path, weight())
    model = onnx.load(path)
    model.graph.node[1].output[0] = "right"
    model.graph.initializer.append(numpy_helper.from_array(np.array([3, 1]), "times"))
    model.graph.node.append(helper.make_node("Tile", ["right", "times"], ["logits"]))
    onnx.save(model, path)


@attack(3, "nothing could be checked")
def graphs_said_not_to_run(bundle: Path) -> None:
    record = json.loads((bundle / "manifest.json").read_text())
    for one in record["onnx"]:
        one["max_error"] = None
    (bundle / "manifest.json").write_text(json.dumps(record))
