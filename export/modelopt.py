"""8-bit graphs for TensorRT: where ModelOpt would quantise a float32 graph, and the same places of a graph in another type.

ModelOpt knows which tensors TensorRT wants quantised, those around an attention among them, so that it stays one kernel. It
changes packages that others use (ONNX Runtime's quantiser, onnx-graphsurgeon), so it runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from patchslim.arrays import Array
from patchslim.choices import Precision
from patchslim.errors import InputRejected

#: Images that are enough for the ranges of values.
CALIBRATION_IMAGES = 64
#: The ONNX type of quantised values, and the largest of them, by precision.
_TYPES = {"int8": (TensorProto.INT8, 127.0), "fp8": (TensorProto.FLOAT8E4M3FN, 448.0)}
_LEAST = {TensorProto.FLOAT16: 2.0**-14}  # the smallest normal scale: smaller ones lose bits
_QUANTISE, _DEQUANTISE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Site:
    """An operand that is quantised: of the node ``node``, by ``scale``, one number or one for each place on ``axis``."""

    node: str
    operand: int
    scale: list[float]
    axis: int | None


def find_sites(slim: Path, images: Array, precision: Precision) -> list[Site]:
    """Where ModelOpt quantises the float32 graph ``slim``, with ranges of values from ``images`` (n, c, h, w).

    Raises ``InputRejected`` for images that are not finite, and where ModelOpt cannot quantise the graph.
    """
    if not np.isfinite(images).all():
        raise InputRejected("a calibration image has values that are NaN or infinite, so no range can be found")
    with tempfile.TemporaryDirectory(prefix="patchslim-modelopt-") as folder:
        work = Path(folder)
        onnx.save(onnx.load(str(slim)), str(work / "model.onnx"))
        np.save(work / "images.npy", images.astype(np.float32))
        done = subprocess.run(
            [sys.executable, "-P", "-m", "export.modelopt_worker", str(work), precision],
            env={**_environment(), "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        found = work / "quantised.onnx"
        if done.returncode != 0 or not found.is_file():
            reason = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "it gave no reason")
            raise InputRejected(f"ModelOpt cannot quantise the slim graph: {reason}", next_step="use --precision fp16")
        return sites_of(onnx.load(str(found)))


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def sites_of(quantised: onnx.ModelProto) -> list[Site]:
    """Every operand of a graph that is read through DequantizeLinear, but where only its shape is."""
    made = {output: node for node in quantised.graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    found = []
    for node in quantised.graph.node:
        if node.op_type in (_QUANTISE, _DEQUANTISE, "Shape"):
            continue
        for operand, name in enumerate(node.input):
            maker = made.get(name)
            if maker is None or maker.op_type != _DEQUANTISE:
                continue
            scale = numpy_helper.to_array(constants[maker.input[1]]).astype(np.float64)
            axis = next((int(one.i) for one in maker.attribute if one.name == "axis"), 1) if scale.size > 1 else None
            found.append(Site(node.name, operand, scale.reshape(-1).tolist(), axis))
    return found


def save_sites(sites: Sequence[Site], path: Path) -> None:
    """Write ``sites`` as JSON; raises ``OSError``."""
    path.write_text(json.dumps([asdict(site) for site in sites]), encoding="utf-8")


def load_sites(text: str) -> list[Site]:
    """Read what ``save_sites`` wrote."""
    return [Site(**fields) for fields in json.loads(text)]


def quantised_at(model: onnx.ModelProto, sites: Sequence[Site], precision: Precision) -> onnx.ModelProto:
    """``model``, in whatever types, with explicit 8-bit quantisation of the operands ``sites``.

    Constants are stored in 8 bits. A tensor that several nodes read by one scale is quantised once. Scales have the type of
    the tensor. A site whose node the model does not have, or that reads nothing of a known type there, is left out.
    """
    types = _types_of(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = {(site.node, site.operand): site for site in sites}
    made: dict[tuple[str, tuple[float, ...]], str] = {}
    nodes: list[onnx.NodeProto] = []
    for before in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(before)
        for operand, name in enumerate(node.input):
            site = wanted.get((node.name, operand))
            if site is None or name not in types:
                continue
            key = (name, tuple(site.scale))
            if key not in made:
                number = sum(name == one for one, _ in made)
                pair = _Pair(f"{name}.{precision}{f'.{number}' if number else ''}")
                nodes += pair.nodes(name, site, types[name], precision, constants.get(name))
                constants |= {tensor.name: tensor for tensor in pair.constants}
                made[key] = pair.name
            node.input[operand] = made[key]
        nodes.append(node)
    read = {name for node in nodes for name in node.input}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(tensor for tensor in constants.values() if tensor.name in read)
    return result


class _Pair:
    """QuantizeLinear and DequantizeLinear of one tensor; of a constant the latter alone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.constants: list[onnx.TensorProto] = []

    def nodes(
        self, source: str, site: Site, kind: int, precision: Precision, constant: onnx.TensorProto | None
    ) -> list[onnx.NodeProto]:
        """The nodes that read ``source``, of the ONNX type ``kind``; ``constants`` are then what they need."""
        stored, largest = _TYPES[precision]
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        scale = np.maximum(np.asarray(site.scale), _LEAST.get(kind, np.finfo(np.float32).tiny)).astype(dtype)
        if site.axis is None:
            scale = scale.reshape(())
        attributes = {} if site.axis is None else {"axis": site.axis}
        zero = np.zeros(scale.shape, dtype=helper.tensor_dtype_to_np_dtype(stored))
        self.constants = [_tensor(f"{self.name}.scale", scale, kind), _tensor(f"{self.name}.zero", zero, stored)]
        ends = [tensor.name for tensor in self.constants]
        values = f"{self.name}.values"
        if constant is not None:
            array = numpy_helper.to_array(constant).astype(np.float32)
            broad = scale.astype(np.float32)
            if site.axis is not None:
                broad = broad.reshape([-1 if place == site.axis % array.ndim else 1 for place in range(array.ndim)])
            grid = np.clip(array / broad, -largest, largest)
            grid = np.rint(grid) if stored == TensorProto.INT8 else grid
            self.constants.append(_tensor(values, grid.astype(helper.tensor_dtype_to_np_dtype(stored)), stored))
            first: list[onnx.NodeProto] = []
        else:
            first = [helper.make_node(_QUANTISE, [source, *ends], [values], name=f"{self.name}.{_QUANTISE}", **attributes)]
        last = helper.make_node(_DEQUANTISE, [values, *ends], [self.name], name=f"{self.name}.{_DEQUANTISE}", **attributes)
        return [*first, last]


def _tensor(name: str, values: Array, kind: int) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, values.shape, np.ascontiguousarray(values).tobytes(), raw=True)


def _types_of(model: onnx.ModelProto) -> dict[str, int]:
    """The ONNX types of all tensors of floating point, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    return {name: kind for name, kind in types.items() if kind in floats}
