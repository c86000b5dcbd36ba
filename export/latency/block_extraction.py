"""Single blocks, and the two ends, cut out of a dense ONNX model as a plan lays them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from export.latency.conditions import TimingConditions
from patchslim.errors import InputRejected
from patchslim.plan import Origin, SlimPlan

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from graph_passes.onnx_io.model import OnnxModel


#: The parts of a model that are timed: all of it, what is before and behind its blocks, and a block by tokens in and out.
WHOLE, STEM, HEAD = "whole", "stem", "head"
Key = str | tuple[int, int]

_DEPTH = 3  # blocks are alike: the second of three stands for all, the last for a last one


class ModelParts:
    """Cuts what is timed out of a dense model: the whole, its ends, and single blocks, as ONNX files of fixed shapes.

    Raises ``InputRejected`` for a file that is not understood or has another fixed batch than ``conditions``.
    """

    def __init__(self, dense: Path, plan: SlimPlan, conditions: TimingConditions) -> None:
        from graph_passes import load_model

        self.plan, self.conditions = plan, conditions
        self.model = load_model(dense)
        fixed = self.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
        if fixed not in (0, conditions.batch):
            raise InputRejected(
                f"{dense}: has the fixed batch size {fixed}, so no table for batches of {conditions.batch} can be measured"
            )
        self.depth = min(plan.depth, _DEPTH)
        self.shallow = first_blocks(self.model, self.depth)

    def write(self, key: Key, path: Path) -> None:
        """Save the part ``key`` to ``path``."""
        from graph_passes import save_model

        if isinstance(key, tuple):
            save_model(self.block(*key), path)
        else:
            save_model(self.end(key), path)

    def _slim(self, model: OnnxModel, counts: list[int]) -> OnnxModel:
        from graph_passes import slim

        head, prefix = self.plan.head_tokens, self.plan.prefix_tokens
        kept = [list(range(count)) if count >= prefix else head for count in counts]
        origin = Origin(score="none", criterion="manual", value=0.0)
        fields = self.plan.model_dump() | {"kept": kept, "mode": self.conditions.mode, "origin": origin.model_dump()}
        fields["merged_into"] = self._merged_into(counts) if self.conditions.merged else None
        laid = self.conditions
        return slim(model, SlimPlan.model_validate(fields), layout=laid.layout, precision=laid.graph).model

    def _merged_into(self, counts: list[int]) -> list[int]:
        """Every dropped token into the first patch, as long as a block keeps one: which it is does not change the time."""
        merged_into, before, first = [-1] * self.plan.tokens, self.plan.tokens, self.plan.prefix_tokens
        for count in counts[:-1]:
            if count > first:
                merged_into[count:before] = [first] * (before - count)
            before = count
        return merged_into

    def block(self, n: int, k: int) -> OnnxModel:
        """One block that reads ``n`` tokens and outputs ``k`` of them, cut as it would be in a slim model."""
        # Only the last block is ever cut to fewer than the prefix tokens; what only the head reads is hardly met elsewhere.
        last = k <= len(self.plan.head_tokens)
        index = self.depth - 1 if last else min(1, self.depth - 1)
        counts = [n] * index + [k] * (self.depth - index)
        return self._between(self._slim(self.shallow, counts), index)

    def end(self, key: str) -> OnnxModel:
        """What is before the blocks (``STEM``) or behind them (``HEAD``), or all of the model (``WHOLE``), nothing dropped."""
        full = [self.plan.tokens] * self.plan.depth
        if key == WHOLE:
            return self._between(self._slim(self.model, full), None)
        return self._between(self._slim(self.shallow, full[: self.depth]), key)

    def _between(self, model: OnnxModel, part: int | str | None) -> OnnxModel:
        """One block of ``model``, or what is before or behind its blocks, or (None) all of it, for ``batch`` images."""
        from graph_passes.analysis.vit_structure import find_structure
        from graph_passes.onnx_io.graph_convert import export_model, import_graph, with_shapes

        graph = import_graph(with_shapes(model))
        blocks = find_structure(graph).blocks
        _batch_is_known(graph, self.conditions.batch)
        if isinstance(part, int):
            graph.inputs, graph.outputs = [blocks[part].input], [blocks[part].output]
        elif part == STEM:
            graph.outputs = [blocks[0].input]
        elif part == HEAD:
            graph.inputs = [blocks[-1].output]
        for tensor in graph.inputs:
            tensor.inputs.clear()
        for tensor in (*graph.inputs, *graph.outputs):
            tensor.shape = [self.conditions.batch, *tensor.shape[1:]]
        return export_model(graph, like=model)


def with_batch(model: OnnxModel, batch: int) -> OnnxModel:
    """A whole model, slim or dense, that takes ``batch`` images and no other number."""
    from graph_passes.onnx_io.graph_convert import export_model, import_graph, with_shapes

    graph = import_graph(with_shapes(model))
    _batch_is_known(graph, batch)
    for tensor in (*graph.inputs, *graph.outputs):
        tensor.shape = [batch, *tensor.shape[1:]]
    return export_model(graph, like=model)


def _batch_is_known(graph: gs.Graph, batch: int) -> None:
    """Put constants for the shape of the images, which an attention pool's query takes its batch from, far behind them."""
    from graph_passes.node_builder import make_constant, replace_all_uses

    images = graph.inputs[0]
    shape = [batch, *images.shape[1:]]
    if not all(isinstance(length, int) for length in shape):
        return
    for node in [reader for reader in images.outputs if reader.op == "Shape"]:
        output = node.outputs[0]
        known = make_constant(f"{output.name}.known", shape[slice(node.attrs.get("start"), node.attrs.get("end"))])
        replace_all_uses(output, known)


def first_blocks(model: OnnxModel, depth: int) -> OnnxModel:
    """``model`` with its head right behind its first ``depth`` blocks."""
    from graph_passes.analysis.vit_structure import find_structure
    from graph_passes.node_builder import replace_all_uses
    from graph_passes.onnx_io.graph_convert import export_model, import_graph, with_shapes

    graph = import_graph(with_shapes(model))
    blocks = find_structure(graph).blocks
    if len(blocks) > depth:
        replace_all_uses(blocks[-1].output, blocks[depth - 1].output)
    return export_model(graph, like=model)
