"""Tiny Vision Transformers for tests, and the independent PyTorch reference of what a plan computes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import timm.layers
import torch
from numpy.typing import NDArray
from timm.layers import QuickGELU, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from graph_passes import OnnxModel
from patchslim.macs import Geometry
from patchslim.plan import Origin, SlimPlan
from tests.helpers import exporters
from tests.helpers.made_once import model_made_once

SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1, "qk_norm": True},
    "layer_scale": {"init_values": 0.1, "pre_norm": True, "qkv_bias": False},
    "distilled": {},
}


# Variants of the same class, each with something in it that the finder has to see through.
FORMS: dict[str, dict[str, Any]] = {
    "gated_mlp": {"mlp_layer": SwiGLU},
    "packed_gated_mlp": {"mlp_layer": SwiGLUPacked, "proj_bias": False},
    "quick_gelu": {"act_layer": QuickGELU, "pre_norm": True, "no_embed_class": True},
    "norms_inside": {"scale_attn_norm": True, "scale_mlp_norm": True, "qk_norm": True},
    "no_positions": {"pos_embed": "none", "act_layer": "gelu_tanh", "fc_norm": True},
}


def tiny_vit(kind: str = "plain", depth: int = 4, size: int = 32) -> VisionTransformer:
    """A timm ViT of width 48 with 16 patches, seeded; norms, scales and biases random so that nothing is an identity."""
    torch.manual_seed(0)
    family = VisionTransformerDistilled if kind == "distilled" else VisionTransformer
    options = {"embed_dim": 48, "depth": depth, "num_heads": 3, "mlp_ratio": 2, "num_classes": 10, **(SIZES | FORMS)[kind]}
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = family(img_size=size, patch_size=8, **options).eval()
    finally:
        timm.layers.set_fused_attn(bool(before))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def export_dense(model: torch.nn.Module, size: int = 32) -> onnx.ModelProto:
    """``torch.onnx.export`` of a dense model, opset 20, dynamic batch."""
    program = torch.onnx.export(
        model,
        (torch.randn(2, 3, size, size),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def plan_for(model: VisionTransformer, kept: list[list[int]], mode: str = "compact") -> SlimPlan:
    """A plan for a timm model by hand."""
    grid = model.patch_embed.grid_size
    heads = 2 if isinstance(model, VisionTransformerDistilled) else 1
    kernel = model.patch_embed.proj.kernel_size
    return SlimPlan.model_validate(
        {
            "model": "tiny",
            "tokens": model.num_prefix_tokens + grid[0] * grid[1],
            "grid": tuple(grid),
            "prefix_tokens": model.num_prefix_tokens,
            "pooling": "token",
            "head_tokens": list(range(heads)),
            "mode": mode,
            "kept": kept,
            "geometry": Geometry(
                embed_dim=model.embed_dim,
                mlp_hidden_dim=2 * model.embed_dim,
                patch_macs=grid[0] * grid[1] * 3 * kernel[0] * kernel[1] * model.embed_dim,
                head_macs=heads * model.num_classes * model.embed_dim,
            ),
            "origin": Origin(score="none", criterion="manual", value=0.0),
        }
    )


def random_plan(model: VisionTransformer, seed: int, mode: str = "compact") -> SlimPlan:
    """A nested plan with random tokens; some blocks keep all that they read, and the last may be cut to the head's tokens."""
    rng = random.Random(seed)
    prefix = model.num_prefix_tokens
    heads = 2 if isinstance(model, VisionTransformerDistilled) else 1
    patches = list(range(prefix, prefix + model.patch_embed.num_patches))
    kept = []
    for block in range(len(model.blocks)):
        if rng.random() < 0.75:
            patches = sorted(rng.sample(patches, rng.randint(1, len(patches))))
        last = block == len(model.blocks) - 1
        kept.append(list(range(heads)) if last and rng.random() < 0.7 else [*range(prefix), *patches])
    return plan_for(model, kept, mode)


@torch.no_grad()
def reference(model: VisionTransformer, plan: SlimPlan, images: torch.Tensor) -> NDArray[np.float32]:
    """Logits of the slimmed model: timm's own modules, block by block, on gathered rows in the original order."""
    x = model._pos_embed(model.patch_embed(images))
    x = model.norm_pre(x)
    present = list(range(plan.tokens))
    for block, kept in zip(model.blocks, plan.kept, strict=True):
        rows = [present.index(token) for token in kept]
        attention, normed = block.attn, block.norm1(x)
        batch, count, width = normed.shape
        heads = attention.num_heads
        qkv = attention.qkv(normed).reshape(batch, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = attention.q_norm(qkv[0][:, :, rows]), attention.k_norm(qkv[1]), qkv[2]
        weights = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, len(rows), width)
        y = x[:, rows] + block.ls1(attention.proj(attention.norm(mixed)))
        y = y + block.ls2(block.mlp(block.norm2(y)))
        if plan.mode == "stale":
            x = x.clone()
            x[:, rows] = y
        else:
            x, present = y, list(kept)
    x = x[:, [present.index(token) for token in plan.head_tokens]]
    x = model.norm(x)
    if isinstance(model, VisionTransformerDistilled):
        return ((model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2).numpy()
    return model.head(model.fc_norm(x[:, 0])).numpy()


def as_proto(model: OnnxModel | onnx.ModelProto) -> onnx.ModelProto:
    """The model in one protobuf."""
    return model.to_proto() if isinstance(model, OnnxModel) else model


def ort_logits(model: OnnxModel | onnx.ModelProto, images: torch.Tensor) -> NDArray[np.float32]:
    """Logits by ONNX Runtime on the CPU, one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(as_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


def macs_of_graph(model: OnnxModel | onnx.ModelProto) -> int:
    """Multiply-accumulates at batch 1, counted from the shapes of MatMul, Gemm and Conv nodes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(as_proto(model))
    copy.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    copy.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(copy, check_type=True, strict_mode=True, data_prop=True)
    shapes = {t.name: list(t.dims) for t in inferred.graph.initializer}
    for info in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        shapes[info.name] = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
    total = 0
    for node in inferred.graph.node:
        out = shapes.get(node.output[0], [])
        if node.op_type in ("MatMul", "Gemm"):
            total += int(np.prod(out)) * shapes[node.input[0]][-1]
        elif node.op_type == "Conv":
            total += int(np.prod(out)) * int(np.prod(shapes[node.input[1]][1:]))
    return total


@cache
def dense(kind: str) -> tuple[VisionTransformer, onnx.ModelProto]:
    """A tiny model of four blocks and its export, made once per test run; do not change either."""
    model = tiny_vit(kind)
    return model, model_made_once(f"tiny-{kind}", lambda: export_dense(model))


@cache
def traced(kind: str) -> tuple[VisionTransformer, onnx.ModelProto]:
    """The same by TorchScript, in a fifth of the time: for what does not depend on the exporter."""
    model = tiny_vit(kind)
    return model, model_made_once(f"traced-{kind}", lambda: trace(model))


def trace(model: torch.nn.Module, size: int = 32, outputs: Sequence[str] = ("logits",)) -> onnx.ModelProto:
    """The export of a dense model by TorchScript, opset 17, dynamic batch."""
    return exporters.torchscript(model, torch.randn(2, 3, size, size), 17, dynamic=True, outputs=outputs)


def edited_model(graph: gs.Graph) -> onnx.ModelProto:
    """The model of a graph after changes by hand: in order, and without the shapes of before."""
    graph.cleanup().toposort()
    model: onnx.ModelProto = gs.export_onnx(graph)
    del model.graph.value_info[:]
    return model


def tiny_cnn() -> onnx.ModelProto:
    """A valid ONNX graph that is no Vision Transformer: one convolution, pooled and classified with a Softmax."""
    weight = onnx.numpy_helper.from_array(np.ones((10, 3, 4, 4), np.float32), "weight")
    nodes = [
        onnx.helper.make_node("Conv", ["images", "weight"], ["features"], name="conv"),
        onnx.helper.make_node("GlobalAveragePool", ["features"], ["pooled"], name="pool"),
        onnx.helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        onnx.helper.make_node("Softmax", ["flat"], ["logits"], name="classify"),
    ]
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "cnn",
        [tensor("images", onnx.TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [tensor("logits", onnx.TensorProto.FLOAT, ["batch", 10])],
        [weight],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
