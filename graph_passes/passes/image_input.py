"""Take pixels from 0 to 255, as bytes or floats, and normalise them in the graph.

Edge cameras deliver bytes in [0, 255]; DeepStream's nvinfer gives float32 planes and has one scale for all channels.
``mean`` and ``std`` are those of pixels in [0, 1], in the order in which the model takes its channels. Where a convolution
without padding reads the images, ``(pixel / 255 - mean) / std`` goes into its weights and bias, in float64, and costs nothing.
With padding, which would have to be of grey rather than of zeros, or before another operator, two nodes compute it.

Before: float images, normalised outside: [B, C, H, W], or [B, H, W, C] where the model itself takes that. After: images of the
same name, [B, C, H, W] or [B, H, W, C] as asked (``--image``): uint8 and a Cast, or float32 (``float-nchw-255``); and a
Transpose where the order differs. The model's metadata say it as ONNX does: ``Image.NominalPixelRange``. It runs before
``drop_patches``, which leaves no convolution; before or behind ``to_fp16``. Site: the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.axes import Axes, Pixels, has
from graph_passes.analysis.patterns import MatchFailure, constant_value, is_unpadded, label
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.node_builder import NodeBuilder, make_constant, replace_all_uses, replace_input
from graph_passes.onnx_io.metadata import FULL_RANGE, NORMALIZATION, PIXEL_RANGE
from graph_passes.pass_registry import Settings, graph_pass
from patchslim.errors import UsageError


@dataclass(frozen=True)
class _Form:
    """Images as a graph may take them: the axis of their channels, and their type."""

    channels: int
    dtype: np.dtype[np.generic]


_FORMS = {
    "uint8-nchw": _Form(1, np.dtype(np.uint8)),
    "uint8-nhwc": _Form(3, np.dtype(np.uint8)),
    "float-nchw-255": _Form(1, np.dtype(np.float32)),
}


@graph_pass("image_input", default=False)
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns 1 if the input was changed, else 0. Raises ``MatchFailure``, and ``UsageError`` for settings that do not fit."""
    structure = find_structure(graph)
    axis_map, images = structure.axis_map, structure.images
    if images.inputs:
        raise MatchFailure(
            label(images.inputs[0]),
            "the graph prepares its images itself up to here; leave out --image, or give the model without its pre-processing",
        )
    if settings.image not in _FORMS:
        raise UsageError(f"image_input: say what the images are to be: --image {', '.join(_FORMS)}")
    form, place = _FORMS[settings.image], _channel_axis(axis_map.of(images) or ())
    if images.dtype == np.uint8 or graph.metadata.get(PIXEL_RANGE) == FULL_RANGE:
        if _Form(place, np.dtype(images.dtype)) != form:
            kind = "bytes" if images.dtype == np.uint8 else "floats from 0 to 255"
            raise MatchFailure(f"graph input '{images.name}'", f"takes {kind} already, but not as {settings.image}")
        return 0
    mean, std = _normalisation(settings, int(images.shape[place]))
    source = _as_computed_with(images)
    pixels = _read_pixels(graph, images, source, place, form)
    convolutions = [node for node in pixels.outputs if node.op != "Shape"]
    if place == 1 and all(_can_take(node) for node in convolutions):
        for conv in convolutions:
            _fold(conv, mean, std)
    else:
        _normalise(graph, pixels, place, mean, std)
    graph.metadata[PIXEL_RANGE] = FULL_RANGE
    graph.metadata.pop(NORMALIZATION, None)
    return 1


def _channel_axis(axes: Axes) -> int:
    return next(index for index, axis in enumerate(axes) if index and not has(axis, Pixels))


def _normalisation(settings: Settings, channels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel; raises ``UsageError``."""
    for key, values in (("mean", settings.mean), ("std", settings.std)):
        if len(values) != channels:
            found = f"{len(values)} were given" if values else "none was given"
            raise UsageError(f"image_input: --{key} must have one value for each of the {channels} channels; {found}")
        if not all(math.isfinite(value) and (value > 0 or key == "mean") for value in values):
            raise UsageError(f"image_input: --{key} must be {'positive' if key == 'std' else 'finite'} numbers, not {values}")
    return np.asarray(settings.mean, np.float64), np.asarray(settings.std, np.float64)


def _as_computed_with(images: gs.Variable) -> gs.Variable:
    """The images in the type that the graph computes with: ``to_fp16`` puts a Cast behind them."""
    readers = [node for node in images.outputs if node.op != "Shape"]
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op == "Cast" else images


def _read_pixels(graph: gs.Graph, images: gs.Variable, source: gs.Variable, place: int, form: _Form) -> gs.Variable:
    """Give ``images`` the form, and return them as floats, laid out as ``source``, whose readers now read them."""
    tensors = (images,) if source is images else (source, images)
    readers = [(node, tensor) for tensor in tensors for node in list(tensor.outputs)]
    shape, dtype = list(images.shape), np.dtype(source.dtype)
    images.dtype, pixels = form.dtype, images
    build = NodeBuilder(graph, images.name, dtype)
    if form.dtype != dtype:
        to = int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
        pixels = build.op("Cast", [images], {"to": to}, name="cast", output=build.name_of("floats"))
    if place != form.channels:
        order = _moving(form.channels, place)  # of the pixels' axes, to have the graph's own
        images.shape = [shape[order.index(axis)] for axis in range(4)]
        pixels = build.op("Transpose", [pixels], {"perm": order}, name="transpose", output=build.name_of("moved"))
    for node, tensor in readers:
        if node.op == "Cast" and node.outputs and node.outputs[0] is source:
            node.outputs.clear()
        else:
            replace_input(node, tensor, pixels)
    return pixels


def _moving(before: int, after: int) -> list[int]:
    """The order of axes that moves the channels from one axis to another."""
    order = [axis for axis in range(4) if axis != before]
    order.insert(after, before)
    return order


def _can_take(node: gs.Node) -> bool:
    """Whether a node is a convolution whose weights can take the normalisation."""
    fixed = node.op == "Conv" and all(constant_value(tensor) is not None for tensor in node.inputs[1:])
    return fixed and is_unpadded(node) and node.attrs.get("group", 1) == 1


def _fold(conv: gs.Node, mean: NDArray[np.float64], std: NDArray[np.float64]) -> None:
    """``W ((x / 255 - mean) / std) + b = (W / (255 std)) x + (b - W (mean / std))``, over channels; rounded once."""
    weights = constant_value(conv.inputs[1])
    assert weights is not None  # the caller saw to it
    exact, channels = weights.astype(np.float64), (1, -1, 1, 1)
    bias = -(exact * (mean / std).reshape(channels)).sum(axis=(1, 2, 3))
    old = constant_value(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if old is not None:
        bias = bias + old.astype(np.float64)
    name = conv.outputs[0].name
    folded = make_constant(f"{name}.of_bytes.weight", (exact / (255 * std).reshape(channels)).astype(weights.dtype))
    conv.inputs = [conv.inputs[0], folded, make_constant(f"{name}.of_bytes.bias", bias.astype(weights.dtype))]


def _normalise(graph: gs.Graph, pixels: gs.Variable, place: int, mean: NDArray[np.float64], std: NDArray[np.float64]) -> None:
    """Two nodes behind ``pixels``: ``(pixel - 255 mean) / (255 std)``."""
    readers, dtype = list(pixels.outputs), np.dtype(pixels.dtype)
    shape = [-1 if axis == place else 1 for axis in range(4)]
    tensor = pixels
    for op, values in (("Sub", 255 * mean), ("Mul", 1 / (255 * std))):
        build = NodeBuilder(graph, f"{pixels.name}.{op.lower()}", dtype)
        tensor = build.op(op, [tensor, build.constant("operand", values.reshape(shape).astype(dtype))])
    replace_all_uses(pixels, tensor, readers)
