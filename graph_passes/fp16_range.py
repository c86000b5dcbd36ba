"""Runs a model in ONNX Runtime to see whether its hidden values fit float16: beyond 65504 they would be infinite."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from pydantic import Field

from graph_passes.onnx_io.files import save_model
from graph_passes.onnx_io.graph_convert import with_shapes
from graph_passes.onnx_io.metadata import FULL_RANGE, PIXEL_RANGE
from graph_passes.onnx_io.model import OnnxModel, copy_fields
from patchslim.errors import InputRejected, Unavailable
from patchslim.records import StrictRecord

LARGEST_FP16 = float(np.finfo(np.float16).max)
_FLOATS = (int(TensorProto.FLOAT), int(TensorProto.FLOAT16))
_RANDOM_IMAGES = 4
#: For images of any size.
_SIDE = 224


class Fp16Range(StrictRecord):
    """What a run in ONNX Runtime says of the hidden values of a model that becomes FP16."""

    images: str = Field(description="the file of the images that were run, or 'random'")
    site: str | None = Field(description="the first node whose values do not fit, or else that of the largest; null: not run")
    largest: float | None = Field(description="the largest magnitude at the site; null: not run")
    fits: bool | None = Field(description="whether every value seen fits float16; null: not run")
    limit: float = Field(description="the largest number of float16")
    reason: str | None = Field(description="why it was not run; null: it was")

    def described(self) -> str:
        """What is wrong where a hidden value does not fit, in words."""
        return (
            f"{self.site} gives {self.largest:g} on {self.images} images; float16 ends at {self.limit:g}, so the result would "
            "answer NaN"
        )


def fp16_range(model: OnnxModel, samples: NDArray[np.generic] | None, name: str) -> Fp16Range:
    """The largest hidden value of a model that is about to become FP16, on ``samples``, which are called ``name``.

    ``samples`` are images as the model takes them; None: random ones. The node named is the first whose values do not fit
    float16, or else the one of the largest. Where ONNX Runtime is missing or cannot run the model, the result says why.
    """
    try:
        return _largest(model, samples, name)
    except (Unavailable, InputRejected) as error:
        return Fp16Range(images=name, site=None, largest=None, fits=None, limit=LARGEST_FP16, reason=str(error))


def _largest(model: OnnxModel, samples: NDArray[np.generic] | None, name: str) -> Fp16Range:
    from patchslim.ort_runner import OrtModel

    watched, sites = _watched(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "watched.onnx"
        save_model(watched, path)
        with OrtModel(path, name="the model before to_fp16") as runner:
            if len(runner.inputs) != 1:
                raise InputRejected(f"it has {len(runner.inputs)} inputs, and images are one")
            taken = runner.inputs[0]
            images = _random(taken.type, taken.shape, pixels=_takes_pixels(model)) if samples is None else samples
            batch = taken.shape[0] if taken.shape and isinstance(taken.shape[0], int) else len(images)
            largest = np.zeros(len(sites))
            for start in range(0, len(images), max(batch, 1)):
                part = np.resize(images[start : start + batch], (batch, *images.shape[1:]))
                if part.dtype.kind == "f":
                    part = part.astype(runner.dtype_of(taken))
                found = np.array([float(value) for value in runner.run({taken.name: part}, [*sites])])
                largest = np.fmax(largest, np.where(np.isnan(found), np.inf, found))
    beyond = np.flatnonzero(largest > LARGEST_FP16)
    place = int(beyond[0]) if beyond.size else int(largest.argmax())
    value = float(min(largest[place], np.finfo(np.float64).max))
    site = list(sites.values())[place]
    return Fp16Range(images=name, site=site, largest=value, fits=not beyond.size, limit=LARGEST_FP16, reason=None)


def _watched(model: OnnxModel) -> tuple[OnnxModel, dict[str, str]]:
    """The model with the largest magnitude of every tensor as an output of its own, and the node behind each."""
    inferred = with_shapes(model).skeleton
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.graph.value_info, *inferred.graph.output)}
    skeleton, sites = onnx.ModelProto(), dict[str, str]()
    copy_fields(inferred, skeleton, "functions")
    del skeleton.graph.value_info[:], skeleton.graph.output[:]
    for node in inferred.graph.node:
        for tensor in node.output:
            if node.op_type == "Constant" or types.get(tensor) not in _FLOATS:
                continue
            prefix = f"patchslim.largest.{len(sites)}"
            steps = [("Cast", {"to": int(TensorProto.FLOAT)}), ("Abs", {}), ("ReduceMax", {"keepdims": 0})]
            source = tensor
            for number, (op, attributes) in enumerate(steps):
                skeleton.graph.node.append(helper.make_node(op, [source], [f"{prefix}.{number}"], **attributes))
                source = f"{prefix}.{number}"
            skeleton.graph.output.append(helper.make_tensor_value_info(source, TensorProto.FLOAT, []))
            sites[source] = f"{node.op_type} node '{node.name or tensor}'"
    return OnnxModel(skeleton, model.weights), sites


def _takes_pixels(model: OnnxModel) -> bool:
    """Whether the model's metadata say that its images are pixels from 0 to 255."""
    return any(entry.key == PIXEL_RANGE and entry.value == FULL_RANGE for entry in model.skeleton.metadata_props)


def _random(kind: str, shape: tuple[int | str, ...], *, pixels: bool) -> NDArray[np.generic]:
    """Noise, and two images of one colour, bright and dark, in the type, size and range that a model takes."""
    sides = [length if isinstance(length, int) else _SIDE for length in shape[1:]]
    rng = np.random.default_rng(0)
    dtypes = {"tensor(uint8)": np.uint8, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    if pixels or kind == "tensor(uint8)":
        images = rng.integers(0, 256, (_RANDOM_IMAGES, *sides), dtype=np.uint8)
        images[-2], images[-1] = 255, 0
        return images.astype(dtypes.get(kind, np.float32))
    values = rng.standard_normal((_RANDOM_IMAGES, *sides), dtype=np.float32)
    values[-2], values[-1] = 2.5, -2.5
    return values.astype(dtypes.get(kind, np.float32))
