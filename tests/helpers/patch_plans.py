"""Plans that drop patches of the tiny models, what these mean, lists of passes, and stems of other forms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from graph_passes.cutting.plan_layout import embedded_tokens
from graph_passes.pass_manager import default_passes
from patchslim.choices import Layout, Mode
from patchslim.plan import SlimPlan
from tests.helpers.onnx_models import (
    SIZES,
    dense,
    edited_model,
    plan_for,
    traced,
)

PATCHES = [[1, 4, 5, 8, 10, 13, 15], [1, 4, 5, 8, 10, 13, 15], [4, 10, 15], []]  # that each block keeps, of 16


def exported_model(kind: str) -> tuple[VisionTransformer, onnx.ModelProto]:
    return dense(kind) if kind in SIZES else traced(kind)


def plan_of(kind: str, mode: Mode = "compact", patches: Sequence[Sequence[int]] = PATCHES) -> SlimPlan:
    model = exported_model(kind)[0]
    prefix = model.num_prefix_tokens
    heads = 2 if kind == "distilled" else 1
    return plan_for(model, [[*range(prefix if kept else heads), *(prefix + patch for patch in kept)] for kept in patches], mode)


def names(*also: str, layout: Layout = "split", before: str = "order_tokens") -> list[str]:
    """The default passes with others put before one of them."""
    result = default_passes(layout, "fp32")
    place = result.index(before)
    return [*result[:place], *also, *result[place:]]


@torch.no_grad()
def masked(model: VisionTransformer, plan: SlimPlan, images: torch.Tensor) -> NDArray[np.float32]:
    """The plan by masks alone: every token goes through every block, but keys are hidden, of never embedded patches always."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    readable = embedded_tokens(plan)
    for block, kept in zip(model.blocks, plan.kept, strict=True):
        attention, (batch, count, width) = block.attn, x.shape
        split = (batch, count, 3, attention.num_heads, width // attention.num_heads)
        q, k, v = attention.qkv(block.norm1(x)).reshape(split).permute(2, 0, 3, 1, 4)
        hidden = torch.full((count,), -torch.inf)
        hidden[readable] = 0
        weights = (attention.q_norm(q) @ attention.k_norm(k).transpose(-2, -1) * attention.scale + hidden).softmax(-1)
        y = x + block.ls1(attention.proj(attention.norm((weights @ v).transpose(1, 2).reshape(x.shape))))
        y = y + block.ls2(block.mlp(block.norm2(y)))
        x = x.clone()
        x[:, kept] = y[:, kept]
        readable = kept if plan.mode == "compact" else readable
    x = model.norm(x)
    if isinstance(model, VisionTransformerDistilled):
        return ((model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2).numpy()
    return model.head(model.fc_norm(x[:, 0])).numpy()


def stem(change: str) -> onnx.ModelProto:
    """The plain export with another stem, which gives as many tokens."""
    graph = gs.import_onnx(dense("plain")[1])
    (conv,) = [node for node in graph.nodes if node.op == "Conv"]
    if change == "two convolutions":
        weight = gs.Constant("first_weight", np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1))
        between = gs.Variable("between", np.float32)
        graph.nodes.insert(0, gs.Node("Conv", "first", {}, [conv.inputs[0], weight], [between]))
        conv.inputs[0] = between
    elif change == "padding":
        weight = np.asarray(conv.inputs[1].values)
        conv.inputs[1] = gs.Constant("wide", np.pad(weight, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge"))
        conv.attrs |= {"pads": [1, 1, 1, 1], "kernel_shape": [10, 10]}
    elif change == "a norm of the grid":
        reader, out = conv.outputs[0].outputs[0], gs.Variable("normed", np.float32)
        one = gs.Constant("one", np.ones((1, 48, 1, 1), np.float32))
        graph.nodes.append(gs.Node("Add", "bias", {}, [conv.outputs[0], one], [out]))
        reader.inputs[0] = out
    return edited_model(graph)
