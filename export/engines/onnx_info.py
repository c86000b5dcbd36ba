"""What a build needs to know of an ONNX file, and the checks that come before any build."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchslim.choices import Precision
from patchslim.errors import InputRejected, Unavailable
from patchslim.packages import install_command


@dataclass(frozen=True)
class OnnxFacts:
    """What a build needs to know of an ONNX file: its one input, its fixed batch (None: dynamic) and its attention nodes."""

    input_name: str
    image_shape: tuple[int, int, int]
    fixed_batch: int | None
    attentions: list[str]
    precision: Precision | None
    quantised: float = 0.0


def read_onnx(path: Path) -> OnnxFacts:
    """Read the structure of the ONNX file at ``path``; weights in external files are not loaded.

    ``precision`` is the type that most weights have, int8 or fp8 where they are quantised, None in a graph without any such
    weights; ``quantised`` is the share of the matrix products and convolutions that read what is quantised.
    Raises ``InputRejected`` where the file is missing, is not ONNX, has no nodes, or does not take one input of shape
    (batch, channels, height, width) with a static image shape; ``Unavailable`` where onnx is not installed.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise Unavailable(f"building an engine needs onnx: {install_command('edge')}") from error
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # protobuf's DecodeError has moved between modules from release to release
        raise InputRejected(f"{path}: not an ONNX file, or cut short ({error})") from error
    if not graph.node:
        raise InputRejected(f"{path}: an ONNX graph without nodes; was the export interrupted?")

    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    shape = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    if len(shape) != 4 or not all(shape[1:]):
        found = ", ".join(value.name for value in inputs)
        raise InputRejected(
            f"{path}: expected one input (batch, channels, height, width), only batch dynamic; found {found} {shape or ''}"
        )
    sizes = {onnx.TensorProto.FLOAT: 0, onnx.TensorProto.FLOAT16: 0, onnx.TensorProto.BFLOAT16: 0}
    eight_bit_floats = any(tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN for tensor in graph.initializer)
    for tensor in graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += _product(tensor.dims)
    return OnnxFacts(
        input_name=inputs[0].name,
        image_shape=(shape[1], shape[2], shape[3]),
        fixed_batch=shape[0] or None,
        attentions=[node.name for node in graph.node if node.op_type in ("Softmax", "Attention")],
        precision=_precision(graph.node, eight_bit_floats, *sizes.values()),
        quantised=_quantised(graph.node),
    )


def _precision(nodes: Iterable[Any], eight_bit_floats: bool, full: int, half: int, brain: int) -> Precision | None:
    """The precision of a graph with so many weights in float32, float16 and bfloat16; the type of what is quantised first."""
    if any(node.op_type == "DequantizeLinear" for node in nodes):
        return "fp8" if eight_bit_floats else "int8"
    most = max(full, half, brain)
    return None if not most else "fp32" if most == full else "fp16" if most == half else "bf16"


def _quantised(nodes: Iterable[Any]) -> float:
    """The share of the products and convolutions that read what a DequantizeLinear gives."""
    given = {output for node in nodes if node.op_type == "DequantizeLinear" for output in node.output}
    products = [node for node in nodes if node.op_type in ("MatMul", "Gemm", "Conv")]
    return sum(any(name in given for name in node.input) for node in products) / max(1, len(products))


def _product(dims: Sequence[int]) -> int:
    total = 1
    for dim in dims:
        total *= dim
    return total
