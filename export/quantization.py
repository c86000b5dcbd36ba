"""INT8 by NNCF: a slim ONNX file with explicit QuantizeLinear and DequantizeLinear, calibrated on images, parts of it not.

Loaded by the stage that quantises, since NNCF takes seconds to import.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from patchslim.arrays import Array
from patchslim.errors import InputRejected, UsageError

if TYPE_CHECKING:
    from patchslim.progress import StageProgress

#: Images that are enough for the ranges of values; with 256 the answers were no better, and it took twice as long.
CALIBRATION_IMAGES = 128
#: The products that merge tokens, by the end of their names: they are small, and one of them is of the residual stream, whose
#: few large values make a coarse grid of 8 bits.
_MERGES = ".merged"
#: The part before the first block: the patch embedding and what is added to it.
EMBEDDING = "embedding"


def nodes_of(model: onnx.ModelProto, patterns: Sequence[str]) -> set[str]:
    """Names of the nodes in which one of ``patterns``, regular expressions, is found.

    Raises ``UsageError`` for one that is found in none.
    """
    found: set[str] = set()
    for pattern in patterns:
        names = {node.name for node in model.graph.node if re.search(pattern, node.name)}
        if not names:
            some = ", ".join(node.name for node in model.graph.node if node.op_type == "MatMul")
            raise UsageError(f"--keep-fp32 {pattern}: matches no node of the graph", next_step=f"its products are {some[:400]}")
        found |= names
    return found


def parts_of(model: onnx.ModelProto, stream: Sequence[str]) -> dict[str, list[str]]:
    """Names of the nodes of each part of the model: the patch embedding, each block, and the head.

    ``stream`` are the tensors of the residual stream before, between and behind the blocks. Raises ``InputRejected`` where one
    of them is not in the graph.
    """
    place = {output: index for index, node in enumerate(model.graph.node) for output in node.output}
    if unknown := [name for name in stream if name not in place]:
        raise InputRejected(f"the graph has no tensor {unknown[0]}, so its blocks are not known")
    names = [node.name for node in model.graph.node]
    bounds = [0, *(place[name] + 1 for name in stream), len(names)]
    titles = [EMBEDDING, *(f"block {index}" for index in range(1, len(stream))), "head"]
    return {title: names[start:end] for title, (start, end) in zip(titles, itertools.pairwise(bounds), strict=True)}


def quantize(
    model: onnx.ModelProto, images: Array, keep: Collection[str] = (), progress: StageProgress = lambda *_: None
) -> onnx.ModelProto:
    """``model`` in INT8 but for the nodes named in ``keep`` and what merges tokens, calibrated on ``images`` (n, c, h, w).

    NNCF's scheme for Transformers: weights by channel, activations by tensor, SmoothQuant, Softmax as it is. All ranges are
    symmetric: where those of activations are not (its preset MIXED), OpenVINO takes 1.03 to 1.05 times as long, and on one
    model a patch embedding in INT8 diverged 20 times as much.
    Raises ``InputRejected`` for images that are not finite, and where NNCF cannot quantise the model.
    """
    if not np.isfinite(images).all():
        raise InputRejected("a calibration image has values that are NaN or infinite, so no range can be found")
    with _quiet():
        import nncf

    name, seen = model.graph.input[0].name, 0

    def feed(image: Array) -> dict[str, Array]:
        nonlocal seen
        seen += 1
        progress("calibrating int8", (seen - 1) % len(images) + 1, len(images))
        return {name: image}

    ignored = {node.name for node in model.graph.node if node.op_type == "MatMul" and node.name.endswith(_MERGES)}
    source = onnx.ModelProto()
    source.CopyFrom(model)
    try:
        with _quiet():
            quantised: onnx.ModelProto = nncf.quantize(
                source,
                nncf.Dataset([image[None] for image in images], feed),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.PERFORMANCE,
                subset_size=len(images),
                ignored_scope=nncf.IgnoredScope(names=sorted({*keep, *ignored})),
                # It triples the time, and no answer was better for it.
                advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
            )
    except KeyboardInterrupt:
        raise
    except Exception as error:  # NNCF's and ONNX Runtime's share no base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputRejected(f"NNCF cannot quantise the slim graph: {reason}", next_step="use --precision fp32") from error
    del quantised.metadata_props[:]
    quantised.metadata_props.extend(model.metadata_props)
    return quantised


def restore(quantised: onnx.ModelProto, original: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """``quantised`` with the nodes ``names`` reading again what they read in ``original``; what nobody reads then is gone."""
    result = onnx.ModelProto()
    result.CopyFrom(quantised)
    graph, wanted = result.graph, set(names)
    inputs = {node.name: list(node.input) for node in original.graph.node if node.name in wanted}
    weights = {tensor.name: tensor for tensor in original.graph.initializer}
    kept: set[str] = set()
    for node in graph.node:
        if node.name in inputs:
            node.input[:] = inputs[node.name]
            kept |= {name for name in node.input if name in weights}
    shared = {name for node in graph.node if node.name not in inputs for name in node.input}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name in kept - shared:
            del graph.initializer[index]
    there = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(weights[name] for name in sorted(kept - there))
    _drop_unread(graph)
    return result


def quantised_products(model: onnx.ModelProto) -> tuple[int, int]:
    """How many of the matrix products and convolutions of ``model`` read what was quantised, and how many there are."""
    made = {output for node in model.graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    return sum(any(name in made for name in node.input) for node in products), len(products)


def rank_parts(
    quantised: onnx.ModelProto,
    original: onnx.ModelProto,
    parts: Mapping[str, Sequence[str]],
    answers: Callable[[onnx.ModelProto], Array],
    progress: StageProgress = lambda *_: None,
) -> list[str]:
    """The ``parts`` of a model, the one that loses most by quantisation first.

    Each is quantised alone; ``answers`` gives a model's logits (n, classes), which are compared with the original's by their
    mean Kullback-Leibler divergence.
    """
    everything = [node.name for node in original.graph.node]
    reference = _log_softmax(answers(original))
    losses = {}
    for index, (title, names) in enumerate(parts.items()):
        alone = restore(quantised, original, set(everything) - set(names))
        found = _log_softmax(answers(alone))
        losses[title] = float((np.exp(reference) * (reference - found)).sum(axis=1).mean())
        progress("ranking blocks by their loss in 8 bits", index + 1, len(parts))
    return sorted(losses, key=lambda title: -losses[title])


def read(path: Path) -> onnx.ModelProto:
    """The model of an ONNX file that a stage made."""
    return onnx.load(str(path))


def write(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model`` as an ONNX file."""
    onnx.save(model, str(path))


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _drop_unread(graph: Any) -> None:
    """Remove nodes and initialisers that no output depends on."""
    needed = {output.name for output in graph.output}
    keep = []
    for node in reversed(list(graph.node)):
        if needed & set(node.output):
            keep.append(node)
            needed |= set(node.input)
    nodes, tensors = keep[::-1], [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF draws on stdout, logs what it does, and would send its makers that it was called."""
    os.environ["NNCF_CI"] = "1"  # its own switch against that
    loggers = [logging.getLogger(name) for name in ("nncf", "torch.utils.cpp_extension")]
    before = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
