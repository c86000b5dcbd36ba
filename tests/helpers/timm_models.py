"""Small timm Vision Transformers of every supported kind, and what a plan means when written down with timm's own modules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import Attention, SwiGLU
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, ParallelScalingBlock, ResPostBlock
from torch import Tensor

from patchslim.choices import Mode
from patchslim.plan import SlimPlan
from slimming.api import make_plan

torch.set_num_threads(1)  # these models are too small for more

TINY: dict[str, Any] = {"img_size": 48, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
#: Kinds that every room understands: timm's name and what differs from ``TINY``.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class_token": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer_scale": ("vit_tiny_patch16_224", {"init_values": 0.5}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "no_embed_class": ("vit_tiny_patch16_224", {"no_embed_class": True, "reg_tokens": 1, "pre_norm": True, "qkv_bias": False}),
    "not_square": ("vit_tiny_patch16_224", {"img_size": (32, 64)}),
}


def _gated_block(dim: int, num_heads: int, **rest: Any) -> Block:
    """A ``Block`` with timm's gated attention, which no constructor of a whole model offers."""
    block = Block(dim, num_heads, **rest)
    block.attn = Attention(dim, num_heads, qkv_bias=True, gated=True)
    return block


#: Further kinds that the PyTorch room understands: heads that pool, other blocks, rotary positions.
FAMILY_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "avg_with_class": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "avg_patches_only": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "avg_registers": ("vit_medium_patch16_reg4_gap_256", {}),
    "avg_of_prefix_too": ("vit_tiny_patch16_224", {"global_pool": "avg", "reg_tokens": 2, "pool_include_prefix": True}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "map_with_class": ("vit_tiny_patch16_224", {"global_pool": "map", "reg_tokens": 1}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2_giant": ("vit_giant_patch14_reg4_dinov2", {}),
    "swiglu": ("vit_tiny_patch16_224", {"mlp_layer": SwiGLU}),
    "inner_norms": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "gated": ("vit_tiny_patch16_224", {"block_fn": _gated_block}),
    "res_post": ("vit_tiny_patch16_224", {"block_fn": ResPostBlock, "init_values": 1.0}),
    "parallel_scaling": ("vit_tiny_patch16_224", {"block_fn": ParallelScalingBlock, "qk_norm": True, "qkv_bias": False}),
    "parallel_scaling_fused": (
        "vit_tiny_patch16_224",
        {"block_fn": partial(ParallelScalingBlock, fuse_out_proj=True), "init_values": 0.5},
    ),
    "parallel_things": ("vit_small_patch16_18x2_224", {"init_values": 0.5}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva_post_norm": ("eva02_enormous_patch14_clip_224", {"mlp_ratio": 4.0}),
    "eva02_rope": ("eva02_tiny_patch14_336", {"img_size": (32, 64)}),
    "eva02_inner_norms": ("eva02_base_patch14_448", {"scale_attn_inner": True}),
    "dinov3": ("vit_small_patch16_dinov3", {"dynamic_img_size": False}),
    "dinov3_plus": ("vit_small_plus_patch16_dinov3", {"dynamic_img_size": False, "global_pool": "token"}),
    "rope_axial": ("vit_small_patch16_rope_224", {}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": (32, 64)}),
    "rope_multimodal": ("vit_small_patch16_rope_224", {"rope_type": "mrope", "rope_grid_indexing": "ij"}),
    "perception_encoder": ("vit_pe_core_tiny_patch16_384", {}),
    "grouped_query": ("vit_base_patch16_sapiens2", {"dynamic_img_size": False, "num_heads": 6, "num_kv_heads": 2}),
}
ALL_KINDS = [*KINDS, *FAMILY_KINDS]


def build(kind: str = "class_token", **more: Any) -> Any:
    """A seeded model of ``kind`` in eval mode; every parameter random, so that no norm, scale or bias is an identity."""
    name, differs = (KINDS | FAMILY_KINDS)[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **{**TINY, **differs, **more}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += (0.3 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter)
    return model


def images_for(model: Any, count: int, seed: int = 1) -> Tensor:
    """Smooth random images (count, 3, h, w), unlike each other, so that tokens differ in how much they matter."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 3, 4, generator=generator)
    return 2 * torch.nn.functional.interpolate(coarse, size=tuple(model.patch_embed.img_size), mode="bicubic")


def pools(model: Any) -> bool:
    """Whether the head averages or attends over patches, by timm's own setting."""
    return model.attn_pool is not None or model.global_pool == "avg"


def random_masks(model: Any, rng: random.Random) -> list[list[int]]:
    """Nested masks with random tokens; some blocks drop nothing, and the last may keep only what the head reads.

    Where the head pools, every block keeps a patch, and the last may drop any prefix tokens.
    """
    prefix, depth = int(model.num_prefix_tokens), len(model.blocks)
    patches = list(range(prefix, prefix + int(model.patch_embed.num_patches)))
    heads = 2 if hasattr(model, "head_dist") else 1
    masks = []
    for block in range(depth):
        if rng.random() < 0.7:
            patches = sorted(rng.sample(patches, rng.randint(int(pools(model)), len(patches))))
        leading = list(range(prefix))
        if block == depth - 1 and rng.random() < 0.6:
            if not pools(model):
                masks.append(leading[:heads])
                continue
            leading = sorted(rng.sample(leading, rng.randint(0, prefix)))
        masks.append([*leading, *patches])
    return masks


def random_plan(model: Any, seed: int, mode: Mode = "compact") -> SlimPlan:
    """A plan of ``random_masks``."""
    return make_plan(model, "tiny", random_masks(model, random.Random(seed)), mode=mode)


def masked_blocks(model: Any, images: Tensor, masks: Sequence[Sequence[int]], mode: str) -> list[Tensor]:
    """Every block's output (b, N, d) under ``masks``, by timm's whole dense blocks on all N tokens.

    In ``compact`` form the keys of dropped tokens get minus infinity; rows of dropped tokens are computed and mean nothing.
    In ``stale`` form every key is read, and rows of dropped tokens are put back to what they were.
    """
    eva, rope = isinstance(model, Eva), None
    tokens = model._pos_embed(model.patch_embed(images))
    if eva:
        tokens, rope = tokens
    tokens = model.norm_pre(tokens)
    count = tokens.shape[1]
    alive = torch.ones(count, dtype=torch.bool)
    outputs = []
    for index, (block, kept) in enumerate(zip(model.blocks, masks, strict=True)):
        updated = torch.zeros(count, dtype=torch.bool)
        updated[list(kept)] = True
        rotation = {"rope": rope[index] if model.rope_mixed and rope is not None else rope} if eva else {}
        if mode == "compact":
            bias = torch.zeros(count, count).masked_fill(~alive[None, :], float("-inf"))
            tokens = block(tokens, attn_mask=bias, **rotation)
            alive = updated
        else:
            tokens = torch.where(updated[None, :, None], block(tokens, **rotation), tokens)
        outputs.append(tokens)
    return outputs


def head_of(model: Any, tokens: Tensor, kept: Sequence[int] | None = None) -> Tensor:
    """Logits of all N tokens (b, N, d) by timm's own norm, pooling and head; a head that pools is shown only ``kept``."""
    normed = model.norm(tokens)
    if kept is None or not pools(model):
        logits: Tensor = model.forward_head(normed)
        return logits
    # timm's Eva attends over prefix tokens too, VisionTransformer only where it says so; an average never does in Eva
    whole = model.attn_pool is not None if isinstance(model, Eva) else model.pool_include_prefix
    shown = torch.zeros(tokens.shape[1], dtype=torch.bool)
    shown[[token for token in kept if whole or token >= model.num_prefix_tokens]] = True
    if model.attn_pool is None:
        pooled = (normed * shown[None, :, None]).sum(dim=1) / shown.sum()
    else:
        hidden = torch.zeros(1, tokens.shape[1]).masked_fill(~shown[None, :], float("-inf"))
        pooled = model.attn_pool(normed, attn_mask=hidden)
    result: Tensor = model.head(model.fc_norm(pooled))
    return result


def without_fused_attention(model: Any) -> Any:
    """``model`` itself, now with attention as plain matrix products, which PyTorch's counter of operations sees."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model
