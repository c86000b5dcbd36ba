"""A model of a few layers, written in each form that ONNX has for weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

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
