"""An ONNX graph as embedding, blocks and head on PyTorch tensors: a ``VitReader``, so the search is the one for PyTorch models.

Tokens are in a plan's order, prefix tokens first.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graph_passes.analysis.axis_map import Attention
from graph_passes.onnx_io.files import save_model
from graph_passes.pass_manager import slim
from patchslim.arrays import Array
from patchslim.choices import Layout, Pooling
from patchslim.errors import InputRejected
from patchslim.macs import Geometry
from patchslim.plan import SlimPlan
from slimming.models.abilities import Refusals
from slimming.models.attention import AttentionInput
from slimming.onnx_models.abilities import GRAPH_REFUSALS
from slimming.onnx_models.masked_graph import GraphPart, MaskedGraph, OnnxExecutor


@dataclass(frozen=True)
class MaskedInput(AttentionInput):
    """What a block is given: ``read`` (b, N, d) has every token in its place; those not ``present`` are not to be seen."""

    present: Sequence[int] = ()
    wanted: Sequence[int] = ()


class RuntimeModel(nn.Module):
    """A session from images (b, 3, h, w) to answers (b, classes), called as a PyTorch model is."""

    def __init__(self, session: OnnxExecutor, images: str, answers: str, *, channels_last: bool = False) -> None:
        super().__init__()
        self.session, self.images, self.answers, self.channels_last = session, images, answers, channels_last
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # says that the images belong on the CPU

    def forward(self, images: Tensor) -> Tensor:
        """Return the answers (b, classes) for images (b, 3, h, w)."""
        value = images.permute(0, 2, 3, 1) if self.channels_last else images
        return torch.from_numpy(self.session.run([self.answers], {self.images: value.numpy()})[0]).flatten(1)


class BlockPart:
    """A block: dense, with a mask over the keys that are not present."""

    def __init__(self, reader: GraphReader, index: int) -> None:
        graph, block = reader.graph, reader.graph.structure.blocks[index]
        self.reader, self.output = reader, block.output
        self.attentions = block.attentions
        softmaxes = [attention.softmax for attention in self.attentions if attention.softmax is not None]
        self.weights: list[gs.Variable] = [node.outputs[0] for node in softmaxes]
        self.values: list[gs.Variable] = [node.inputs[operand] for node, operand in (a.values for a in self.attentions)]
        self.whole = GraphPart(graph, block.input, [block.output, *self.weights])
        self.looks = GraphPart(graph, block.input, self.weights)
        self.looks_with_values = GraphPart(graph, block.input, [*self.weights, *self.values])

    def run(self, view: AttentionInput) -> Tensor:
        """Return the block's output at the wanted tokens (b, k, d); its maps are appended to the view's sink, if it has one."""
        outputs = [self.output, *(self.weights if view.sink is not None else [])]
        result, *weights = self._run(self.whole, view, outputs)
        if view.sink is not None:
            view.sink.extend(self._maps(each, view) for each in weights)
        return torch.from_numpy(result)[:, self.reader.places(view.wanted if isinstance(view, MaskedInput) else None)]

    def maps(self, view: AttentionInput) -> Tensor:
        """Return the softmax matrices P (b, heads, k, n) of the wanted tokens over those present; attentions side by side."""
        return torch.cat([self._maps(each, view) for each in self._run(self.looks, view)], dim=1)

    def value_norms(self, view: AttentionInput) -> Tensor:
        """Return the norms of the values of the tokens present (b, heads, n); attentions side by side."""
        _, columns = self._rows(view)
        found = self._run(self.looks_with_values, view)
        maps, values = found[: len(self.weights)], found[len(self.weights) :]
        each = []
        for weights, value in zip(maps, values, strict=True):
            images = len(view.read)
            norms = torch.from_numpy(value).reshape(images, -1, *value.shape[-2:]).norm(dim=-1)
            heads = weights.reshape(images, -1, *weights.shape[-2:]).shape[1]
            each.append(norms.repeat_interleave(heads // norms.shape[1], dim=1)[..., columns])
        return torch.cat(each, dim=1)

    def _run(self, part: GraphPart, view: AttentionInput, outputs: list[gs.Variable] | None = None) -> list[Array]:
        graph, present = self.reader.graph, view.present if isinstance(view, MaskedInput) else range(self.reader.tokens)
        masks = {graph.key_masks[id(a.mix)].name: self.reader.key_mask(a, present) for a in self.attentions}
        return part.run(view.read[:, self.reader.order].numpy(), masks, outputs)

    def _maps(self, weights: Array, view: AttentionInput) -> Tensor:
        rows, columns = self._rows(view)
        heads = torch.from_numpy(weights).reshape(len(view.read), -1, *weights.shape[-2:])
        return heads if rows == columns == list(range(self.reader.tokens)) else heads[:, :, rows][..., columns]

    def _rows(self, view: AttentionInput) -> tuple[list[int], list[int]]:
        """Places of the wanted and of the present tokens in the graph's order."""
        if not isinstance(view, MaskedInput):
            return self.reader.places(None), self.reader.places(None)
        return self.reader.places(view.wanted), self.reader.places(view.present)


class HeadPart:
    """What follows the last block: a ``VitHead``.

    ``beside`` are all prefix tokens where the head reads single ones beside its pool: the last block then keeps them.
    """

    def __init__(self, reader: GraphReader) -> None:
        self.reader, graph = reader, reader.graph
        structure = graph.structure
        pool = graph.pools[0].mix if graph.pools else graph.means[0] if graph.means else None
        self.pooling: Pooling = "token" if pool is None else "map" if graph.pools else "avg"
        self.single = list(structure.head_tokens)
        self.pool_tokens = [] if pool is None else graph.pooled[id(pool)]
        self.beside = [*range(structure.prefix_tokens)] if self.single and pool is not None else []
        self.tokens = sorted({*self.beside, *self.single, *self.pool_tokens})
        self.answers = GraphPart(graph, structure.stream[-1], [graph.graph.outputs[0]])
        self.pool = None if pool is None else GraphPart(graph, structure.stream[-1], [pool.outputs[0], *self._weights(graph)])

    @staticmethod
    def _weights(graph: MaskedGraph) -> list[gs.Variable]:
        return [pool.softmax.outputs[0] for pool in graph.pools if pool.softmax is not None]

    @property
    def fixed(self) -> bool:
        """Whether the head needs every token that it reads."""
        return self.pooling == "token"

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the answers (b, classes) of the tokens that the head is given (b, k, d), in original order."""
        return torch.from_numpy(self._run(self.answers, tokens)[0]).flatten(1)

    def pooled(self, tokens: Tensor) -> Tensor:
        """Return the mean of the given tokens (b, k, d), or what the attention pool mixes of their values: (b, width)."""
        assert self.pool is not None  # a head that does not pool is never cut
        return torch.from_numpy(self._run(self.pool, tokens)[0]).flatten(1)

    def weights(self, tokens: Tensor) -> Tensor:
        """Return how the answer depends on each given token (b, k, r): its weight in the pool, a column per single token."""
        slots = self._slots(tokens)
        single = torch.zeros(len(slots), len(self.single))
        for column, token in enumerate(self.single):
            single[slots.index(token), column] = 1
        columns = [single.expand(len(tokens), -1, -1)] if self.single else []
        if self.pooling == "avg":
            pooled = torch.tensor([float(token in self.pool_tokens) for token in slots])
            columns.append((pooled / pooled.sum())[None, :, None].expand(len(tokens), -1, -1))
        elif self.pooling == "map":
            assert self.pool is not None
            maps = torch.from_numpy(self._run(self.pool, tokens)[1]).reshape(len(tokens), -1, len(self.pool_tokens)).mean(dim=1)
            every = torch.zeros(len(tokens), self.reader.tokens)
            every[:, self.pool_tokens] = maps
            columns.append(every[:, slots, None])
        return torch.cat(columns, dim=2)

    def _slots(self, tokens: Tensor) -> list[int]:
        """Where the given tokens are laid: to a pool it is all the same, and single tokens come first."""
        return self.tokens[: tokens.shape[1]]

    def _run(self, part: GraphPart, tokens: Tensor) -> list[Array]:
        graph, slots = self.reader.graph, self._slots(tokens)
        stream = self.reader.laid(tokens, slots)[:, self.reader.order]
        masks = {graph.key_masks[id(pool.mix)].name: self.reader.key_mask(pool, slots) for pool in graph.pools}
        for mean in graph.means:
            read = graph.pooled[id(mean)]
            there = np.isin(read, slots)
            mask = graph.mean_masks[id(mean)]
            masks[mask.name] = (there * (len(read) / there.sum())).reshape(mask.shape)
        return part.run(stream.numpy(), masks)


class GraphReader:
    """The graph in the file ``path`` as embedding, blocks and head: a ``VitReader`` on the CPU.

    ``side`` sets an image height and width that the file leaves open, in pixels. Raises ``InputRejected`` naming the node at
    which the graph is no Vision Transformer that can be searched.
    """

    device = torch.device("cpu")
    refusals: Refusals = GRAPH_REFUSALS

    def __init__(self, path: Path, side: int | None = None) -> None:
        self.graph = MaskedGraph(path, side)
        structure = self.graph.structure
        self.prefix, self.tokens, self.grid = structure.prefix_tokens, structure.tokens, structure.grid
        self.order = structure.order
        self._place = {token: place for place, token in enumerate(self.order)}
        self.stem = GraphPart(self.graph, self.graph.images, [structure.stream[0]])
        self.blocks = [BlockPart(self, index) for index in range(len(structure.blocks))]
        self.head = HeadPart(self)
        self.model = self.runtime(OnnxExecutor(path, str(path), self.graph.batch))

    def runtime(self, session: OnnxExecutor) -> RuntimeModel:
        """Return ``session``, which has this graph's inputs and outputs, as a model."""
        graph = self.graph
        return RuntimeModel(session, graph.images.name, graph.graph.outputs[0].name, channels_last=graph.channels_last)

    @property
    def classes(self) -> int | None:
        """How many answers the graph gives, where that is known."""
        shape = self.graph.graph.outputs[0].shape or []
        return int(shape[-1]) if len(shape) == 2 and isinstance(shape[-1], int) else None

    def geometry(self) -> Geometry:
        """Return the sizes that MACs are counted with."""
        return self.graph.geometry

    def embed(self, images: Tensor) -> Tensor:
        """Return the first block's input (b, N, d), prefix tokens first, of images (b, 3, h, w)."""
        value = images.permute(0, 2, 3, 1) if self.graph.channels_last else images
        return torch.from_numpy(self.stem.run(value.numpy(), {})[0])[:, self.places(None)]

    def ropes(self) -> list[Tensor | None]:
        """Return None for each block: rotary tables are in the graph."""
        return [None] * len(self.blocks)

    def view(self, read: Tensor, present: Sequence[int], wanted: Sequence[int] | None, rope: Tensor | None) -> MaskedInput:
        """Return what a block is given: ``read`` (b, n, d) holds the tokens ``present``; it computes ``wanted`` (None: all)."""
        laid = self.laid(read, present)
        return MaskedInput(laid, laid, present=list(present), wanted=list(present if wanted is None else wanted))

    def laid(self, tokens: Tensor, present: Sequence[int]) -> Tensor:
        """Return tokens (b, n, d) in their places among all (b, N, d); absent ones repeat the first: norms take no zeros."""
        if len(present) == self.tokens:
            return tokens
        every = tokens[:, :1].expand(-1, self.tokens, -1).clone()
        every[:, list(present)] = tokens
        return every

    def places(self, tokens: Sequence[int] | None) -> list[int]:
        """Return where tokens (None: all) are in the graph's order."""
        return [self._place[token] for token in (range(self.tokens) if tokens is None else tokens)]

    def key_mask(self, attention: Attention, present: Sequence[int]) -> NDArray[np.float32]:
        """Return what is added to an attention's scores so that only the tokens ``present`` are read: 0 or minus infinity."""
        read = self.graph.structure.indices(attention.read)
        return np.where(np.isin(read, list(present)), 0, -np.inf).astype(np.float32)

    def slimmed(self, plan: SlimPlan, layout: Layout = "split") -> RuntimeModel:
        """Return the graph with the plan's tokens cut out, in ONNX Runtime. Raises ``InputRejected`` where it cannot be cut."""
        graph = self.graph
        try:
            with contextlib.redirect_stdout(sys.stderr):  # onnx-graphsurgeon logs to stdout, which is kept for the result
                result = slim(graph.original, plan, layout=layout)
        except InputRejected as error:
            raise InputRejected(f"{graph.path}: {error}") from error
        with tempfile.TemporaryDirectory(prefix="patchslim-") as folder:
            path = Path(folder) / "slim.onnx"
            save_model(result.model, path)
            return self.runtime(OnnxExecutor(path, f"{graph.path}, cut", graph.batch))
