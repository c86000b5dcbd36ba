"""An ONNX Vision Transformer taken apart: embedding, blocks and head, each with inputs that say which tokens are there.

A token that is not there is masked: minus infinity on its scores wherever an attention reads keys, zero in a mean of the head.
The tokens that are there then get what a slim graph would give them, so that one session per block serves any plan.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch

from graph_passes.analysis.axes import UNKNOWN_BATCH, Batch, token_axis
from graph_passes.analysis.axis_map import Attention
from graph_passes.analysis.macs import geometry_of, regions
from graph_passes.analysis.patterns import MatchFailure, label
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.node_builder import NodeBuilder, replace_input
from graph_passes.onnx_io.files import read_model
from graph_passes.onnx_io.graph_convert import export_model, import_graph, sorted_nodes, with_shapes
from graph_passes.onnx_io.graph_interface import with_image_size
from graph_passes.onnx_io.model import OnnxModel
from graph_passes.pass_manager import load_model, run_passes
from graph_passes.pass_registry import Settings
from patchslim.arrays import Array
from patchslim.errors import InputRejected, UsageError
from patchslim.ort_runner import OrtModel

#: What makes any exporter's graph readable.
PREPARE = ("fold_constants", "expand_attention")


class OnnxExecutor:
    """A model in ONNX Runtime on the CPU, for any number of images whatever batch it was exported for.

    ``model`` is a file or a serialised model. Raises ``InputRejected`` where ONNX Runtime cannot load it.
    """

    def __init__(self, model: Path | bytes, name: str, batch: int = UNKNOWN_BATCH) -> None:
        self.model = OrtModel(model, name=name, threads=torch.get_num_threads())
        self.batch = batch
        self.types = {given.name: self.model.dtype_of(given) for given in self.model.inputs}

    def run(self, names: Sequence[str], images: dict[str, Array], shared: dict[str, Array] | None = None) -> list[Array]:
        """Return the outputs ``names`` as float32: ``images`` are inputs with a row per image, ``shared`` the others."""
        count = len(next(iter(images.values())))
        size = count if self.batch == UNKNOWN_BATCH else self.batch
        found: list[list[Array]] = []
        fixed = {name: value.astype(self.types[name]) for name, value in (shared or {}).items() if name in self.types}
        for start in range(0, count, size):
            rows = [row if row < count else start for row in range(start, start + size)]  # the last batch is filled up
            feeds = {name: np.ascontiguousarray(value[rows], self.types[name]) for name, value in images.items()}
            found.append(self.model.run({**feeds, **fixed}, names))
        parts = [np.concatenate(each) if len(each) > 1 else each[0] for each in zip(*found, strict=True)]
        return [part[: len(part) // (-(-count // size) * size) * count].astype(np.float32, copy=False) for part in parts]


class GraphPart:
    """A stretch of the graph as a session, made when it is first run: from one tensor, and masks, to ``outputs``."""

    def __init__(self, graph: MaskedGraph, source: gs.Variable, outputs: Sequence[gs.Variable]) -> None:
        self.graph, self.source, self.outputs = graph, source, list(outputs)

    @cached_property
    def _session(self) -> OnnxExecutor:
        graph, images = self.graph.graph, self.graph.images
        ends = {id(self.source)}
        wanted, seen = list(self.outputs), set[int]()
        while wanted:
            tensor = wanted.pop()
            if id(tensor) in ends or not tensor.inputs or id(tensor.inputs[0]) in seen:
                continue
            seen.add(id(tensor.inputs[0]))
            wanted.extend(tensor.inputs[0].inputs)
        nodes = [node for node in sorted_nodes(graph) if id(node) in seen]
        read = {id(tensor): tensor for node in nodes for tensor in node.inputs}
        # The images too, where a block asks them for the size of the batch.
        inputs = [self.source, *(t for t in [images, *self.graph.masks] if id(t) in read and t is not self.source)]
        part = gs.Graph(nodes, inputs, self.outputs, opset=graph.opset, import_domains=graph.import_domains)
        with contextlib.redirect_stdout(sys.stderr):  # onnx-graphsurgeon logs to stdout, which is kept for the result
            model = export_model(part, like=self.graph.model)
        return OnnxExecutor(model.to_proto().SerializeToString(), self.graph.name, self.graph.batch)

    def run(self, value: Array, masks: dict[str, Array], outputs: Sequence[gs.Variable] | None = None) -> list[Array]:
        """Return ``outputs`` (None: all) for ``value``, which has a row per image."""
        session = self._session
        names = [tensor.name for tensor in (self.outputs if outputs is None else outputs)]
        images = {self.source.name: value}
        if self.graph.images.name in session.types and self.source is not self.graph.images:
            shape = [int(length) for length in self.graph.images.shape[1:]]
            images[self.graph.images.name] = np.broadcast_to(np.zeros((), np.float32), (len(value), *shape))
        return session.run(names, images, masks)


class MaskedGraph:
    """A dense graph that was understood, with a mask in front of every attention's Softmax and every mean of the head.

    ``key_masks`` and ``mean_masks`` are inputs by the attention's or mean's own node, ``pooled`` the tokens (plan indices) that
    a mean or an attention pool of the head reads. Raises ``InputRejected`` naming the node at which the graph is no Vision
    Transformer that can be searched.
    """

    def __init__(self, path: Path, side: int | None = None) -> None:
        self.path, self.name = path, str(path)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self.original = _load(path, side)
                self.model = run_passes(self.original, PREPARE, Settings()).model
                self.graph = import_graph(with_shapes(self.model))
                self.structure = find_structure(self.graph)
            self.axis_map = self.structure.axis_map
            self.images: gs.Variable = next(tensor for tensor in self.graph.inputs if tensor.outputs)
            self.batch = self.axis_map.batch.size
            self._ensure_readable()
            self.head = regions(self.structure)[-1]
            self.means = [node for node in self.head if self._is_mean(node)]
            self.pools = [attention for attention in self.axis_map.attentions if attention.queried is None]
            self._ensure_head()
            self.geometry = geometry_of(self.structure)
        except MatchFailure as failure:
            raise InputRejected(f"{path}: {failure}") from failure
        self.pooled = {id(pool.mix): self.structure.indices(pool.read) for pool in self.pools}
        self.pooled |= {id(node): self.structure.indices(self.axis_map.tokens(node.inputs[0])) for node in self.means}
        self.masks: list[gs.Variable] = []
        self.key_masks = {id(attention.mix): self._mask_keys(attention) for attention in self.axis_map.attentions}
        self.mean_masks = {id(node): self._mask_mean(node) for node in self.means}

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        shape = [int(length) for length in self.images.shape[1:]]
        return (shape[0], shape[1]) if self.channels_last else (shape[1], shape[2])

    @property
    def channels_last(self) -> bool:
        """Whether images come as (b, h, w, 3)."""
        return bool(self.images.shape[1] != 3)

    def _is_mean(self, node: gs.Node) -> bool:
        return bool(
            node.op == "ReduceMean" and self.axis_map.tokens(node.inputs[0]) and not self.axis_map.tokens(node.outputs[0])
        )

    def _ensure_readable(self) -> None:
        """Raise ``MatchFailure`` unless images are float RGB and every block is dense, its maps within reach."""
        site = f"graph input '{self.images.name}'"
        if self.structure.images is not self.images:
            expected = (
                "expected images made ready outside; the graph prepares its own: make the plan from the same model without that"
            )
            raise MatchFailure(site, expected)
        if np.dtype(self.images.dtype).kind != "f":
            expected = (
                f"expected normalised images; it takes {np.dtype(self.images.dtype).name}: give the graph before that pass"
            )
            raise MatchFailure(site, expected)
        if 3 not in (self.images.shape[1], self.images.shape[3]):
            raise MatchFailure(site, f"expected images of three channels; its shape is {self.images.shape}")
        for stream in self.structure.stream:
            axes = self.axis_map.of(stream) or ()
            if len(axes) != 3 or token_axis(axes) != 1:
                raise MatchFailure(label(stream.inputs[0]), "expected tokens as [images, tokens, width] between the blocks")
        for block in self.structure.blocks:
            if not block.computes == block.reads == self.structure.order:
                raise MatchFailure(
                    block.site, "expected every token to be read and computed: plans are made from the dense graph"
                )
            for attention in block.attentions:
                if attention.softmax is None:
                    raise MatchFailure(label(attention.mix), "expected an attention whose Softmax can be read")
                maps = self.axis_map.of(attention.softmax.outputs[0])
                if maps is None or not maps[0] or not isinstance(maps[0][0], Batch):
                    raise MatchFailure(label(attention.softmax), "expected images on the first axis")

    def _ensure_head(self) -> None:
        """Raise ``MatchFailure`` unless tokens mean the same to the head wherever they are from."""
        if any(table.node is node for table in self.axis_map.tables for node in self.head):
            raise MatchFailure("head", "expected no constants for each token behind the last block")
        if any(token >= self.structure.prefix_tokens for token in self.structure.head_tokens):
            raise MatchFailure("head", "expected it to read prefix tokens one by one, or to pool; it reads single patches")
        if self.structure.pools and len(self.means) + len(self.pools) != 1:
            raise MatchFailure("head", f"expected one mean or attention pool; found {len(self.means) + len(self.pools)}")
        if self.pools and self.pools[0].softmax is None:
            raise MatchFailure(label(self.pools[0].mix), "expected an attention pool whose Softmax can be read")

    def _mask_keys(self, attention: Attention) -> gs.Variable:
        """Add an input to the scores in front of an attention's Softmax: one number for each key."""
        softmax = attention.softmax
        assert softmax is not None  # seen to before
        scores = softmax.inputs[0]
        mask = self._input(scores.dtype, [attention.read.size])
        masked = gs.Variable(f"{mask.name}.scores", dtype=scores.dtype, shape=scores.shape)
        softmax.inputs[0] = NodeBuilder(self.graph, mask.name).op("Add", [scores, mask], output=masked)
        return mask

    def _mask_mean(self, mean: gs.Node) -> gs.Variable:
        """Multiply what a mean over tokens reads by an input: one number for each token."""
        tokens = mean.inputs[0]
        axes = self.axis_map.of(tokens)
        place = None if axes is None else token_axis(axes)
        if axes is None or place is None:
            raise MatchFailure(label(mean), "expected tokens on an axis of their own")
        held = self.axis_map.tokens(tokens)
        assert held is not None
        mask = self._input(tokens.dtype, [held.size if index == place else 1 for index in range(len(axes))])
        scaled = gs.Variable(f"{mask.name}.tokens", dtype=tokens.dtype, shape=tokens.shape)
        replace_input(mean, tokens, NodeBuilder(self.graph, mask.name).op("Mul", [tokens, mask], output=scaled))
        return mask

    def _input(self, dtype: np.dtype[Any] | type, shape: list[int]) -> gs.Variable:
        mask = gs.Variable(f"patchslim.mask_{len(self.masks)}", dtype=dtype, shape=shape)
        self.masks.append(mask)
        return mask


def _load(path: Path, side: int | None) -> OnnxModel:
    """The model at ``path``, its open image height and width fixed at ``side``; messages name this command's options."""
    try:
        if side is None:
            return load_model(path)
        return with_image_size(read_model(path), side, side)
    except UsageError as error:
        raise UsageError(f"--img-size {side}: {path}: {error}") from error
    except InputRejected as error:
        text = str(error).replace("--image-size", "--img-size").replace("--outputs", "`graph_passes.run --outputs`")
        raise InputRejected(text) from error
