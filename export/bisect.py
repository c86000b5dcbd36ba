"""``--bisect``: walks the blocks of two stages on the golden inputs, and names the first whose output leaves its tolerance."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.stage_names import PYTORCH_SLIM
from patchslim.arrays import Array
from patchslim.choices import Precision
from patchslim.errors import InputRejected
from patchslim.ort_runner import OrtModel
from validate.parity import logit_errors, logit_tolerance, stage_precision

if TYPE_CHECKING:
    from slimming.models.slim_vit import SlimViT

#: The residual stream behind 0, 1, ... blocks: arrays (b, tokens, d).
Streams = list[Array]


@dataclass(frozen=True)
class BlockDifference:
    """How far apart two stages are behind ``block`` blocks (0: what enters the first), as an absolute difference.

    ``max_error`` is None where one of them is not finite.
    """

    block: int
    max_error: float | None
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.max_error is not None and self.max_error <= self.tolerance


@dataclass(frozen=True)
class Bisection:
    """Two stages block by block, each as far from the other as ``blocks`` say."""

    stage: str
    before: str
    blocks: list[BlockDifference]

    @property
    def first(self) -> int | None:
        """The first block, counted from 1, whose output leaves its tolerance; 0 is what enters it; None: no block's does."""
        return next((each.block for each in self.blocks if not each.passed), None)

    def __str__(self) -> str:
        if self.first is None:
            worst = max(self.blocks, key=lambda each: (each.max_error or 0.0) / each.tolerance)
            where = "what enters the first block" if not worst.block else f"block {worst.block}"
            return f"{self.stage} against {self.before}: every block is within its tolerance; the furthest is {where}"
        found = self.blocks[self.first]
        where = "what enters the first block" if not self.first else f"block {self.first}"
        error = "is not finite" if found.max_error is None else f"is {found.max_error:.3g} off, more than {found.tolerance:.3g}"
        return f"{self.stage} against {self.before}: {where} {error}, and is the first"


def bisect(dense: Path, graphs: Mapping[str, Path], slimmed: Callable[[], SlimViT], inputs: Array) -> list[Bisection]:
    """Compare every ONNX stage of ``graphs`` with the stage before it, block by block; the first is compared with PyTorch's.

    ``dense`` is the graph that they were cut from, whose tensors keep their names; ``inputs`` are images (k, 3, h, w). Raises
    ``InputRejected`` for a graph in which no blocks are found, or whose tensors behind them were renamed.
    """
    names = stream_names(dense)
    before, reference = PYTORCH_SLIM, torch_streams(slimmed(), inputs)
    found = []
    for stage, path in graphs.items():
        streams = in_plan_order(onnx_streams(path, names, inputs), reference)
        found.append(Bisection(stage, before, differences(reference, streams, stage_precision(stage))))
        before, reference = stage, streams
    return found


def differences(reference: Streams, streams: Streams, precision: Precision) -> list[BlockDifference]:
    """How far ``streams`` are from ``reference`` behind each block, and how far they may be: as logits, by their size."""
    found = []
    for block, (wanted, there) in enumerate(zip(reference, streams, strict=True)):
        error = None
        if np.isfinite(there).all() and np.isfinite(wanted).all():
            error, _ = logit_errors(there.reshape(len(there), -1), wanted.reshape(len(wanted), -1))
        found.append(BlockDifference(block, error, logit_tolerance(precision, wanted.reshape(len(wanted), -1))))
    return found


def stream_names(dense: Path) -> list[str]:
    """The tensors that hold the residual stream before, between and behind the blocks of a dense graph."""
    from graph_passes import load_model
    from graph_passes.analysis.patterns import MatchFailure
    from graph_passes.analysis.vit_structure import find_structure
    from graph_passes.onnx_io.graph_convert import import_graph, with_shapes

    try:
        return [str(tensor.name) for tensor in find_structure(import_graph(with_shapes(load_model(dense)))).stream]
    except MatchFailure as error:
        raise InputRejected(f"{dense}: its blocks are not found: {error}") from error


def onnx_streams(path: Path, names: Sequence[str], inputs: Array) -> Streams:
    """What the tensors ``names`` of an ONNX file hold on ``inputs``, float32.

    Raises ``InputRejected`` where one is not there.
    """
    import onnx

    from graph_passes import load_model, save_model

    model = load_model(path)
    known = {output for node in model.skeleton.graph.node for output in node.output}
    if unknown := [name for name in names if name not in known]:
        raise InputRejected(f"{path}: has no tensor {unknown[0]}, so its blocks cannot be looked at")
    outputs = {output.name for output in model.skeleton.graph.output}
    model.skeleton.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in outputs)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "streams.onnx")
        with OrtModel(Path(folder) / "streams.onnx", name=str(path)) as opened:
            feed = {opened.inputs[0].name: inputs.astype(opened.dtype_of(opened.inputs[0]))}
            return [np.asarray(value, dtype=np.float32) for value in opened.run(feed, names)]


def torch_streams(module: SlimViT, inputs: Array) -> Streams:
    """The residual stream of the PyTorch reference on ``inputs``."""
    import torch

    device: Any = next(module.parameters()).device
    with torch.inference_mode():
        return [stream.float().cpu().numpy() for stream in module.streams(torch.from_numpy(inputs).to(device))]


def in_plan_order(streams: Streams, reference: Streams) -> Streams:
    """``streams`` with their tokens in the order of the reference, which keeps the original one; the passes sort them.

    Each token is taken for the one that it is nearest to, on all images; where two are nearest to the same one, as behind a
    block that answers wrongly, the tokens stay as they are.
    """
    found = []
    for stream, wanted in zip(streams, reference, strict=True):
        distances = np.abs(stream[:, :, None] - wanted[:, None]).mean(axis=(0, 3))
        order = distances.argmin(axis=0)
        found.append(stream[:, order] if len({*order.tolist()}) == len(order) else stream)
    return found
