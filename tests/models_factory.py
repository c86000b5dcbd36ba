"""Small timm Vision Transformers of every supported kind, and what a plan means when written down with timm's own modules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor

from slimming.api import make_plan
from slimming.plan import Mode, SlimPlan

torch.set_num_threads(1)  # these models are too small for more

TINY: dict[str, Any] = {"img_size": 48, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
#: Supported kinds: timm's name and what differs from ``TINY``.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class_token": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer_scale": ("vit_tiny_patch16_224", {"init_values": 0.5}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "no_embed_class": ("vit_tiny_patch16_224", {"no_embed_class": True, "reg_tokens": 1, "pre_norm": True, "qkv_bias": False}),
    "not_square": ("vit_tiny_patch16_224", {"img_size": (32, 64)}),
}


def build(kind: str = "class_token", **more: Any) -> Any:
    """A seeded model of ``kind`` in eval mode; every parameter random, so that no norm, scale or bias is an identity."""
    name, differs = KINDS[kind]
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


def random_masks(model: Any, rng: random.Random) -> list[list[int]]:
    """Nested masks with random tokens; some blocks drop nothing, and the last may keep only what the head reads."""
    prefix, depth = int(model.num_prefix_tokens), len(model.blocks)
    patches = list(range(prefix, prefix + int(model.patch_embed.num_patches)))
    heads = 2 if hasattr(model, "head_dist") else 1
    masks = []
    for block in range(depth):
        if rng.random() < 0.7:
            patches = sorted(rng.sample(patches, rng.randint(0, len(patches))))
        masks.append(list(range(heads)) if block == depth - 1 and rng.random() < 0.6 else [*range(prefix), *patches])
    return masks


def random_plan(model: Any, seed: int, mode: Mode = "compact") -> SlimPlan:
    """A plan of ``random_masks``."""
    return make_plan(model, "tiny", random_masks(model, random.Random(seed)), mode=mode)


def masked_blocks(model: Any, images: Tensor, masks: Sequence[Sequence[int]], mode: str) -> list[Tensor]:
    """Every block's output (b, N, d) under ``masks``, by timm's whole dense blocks on all N tokens.

    In ``compact`` form the keys of dropped tokens get minus infinity; rows of dropped tokens are computed and mean nothing.
    In ``stale`` form every key is read, and rows of dropped tokens are put back to what they were.
    """
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    count = tokens.shape[1]
    alive = torch.ones(count, dtype=torch.bool)
    outputs = []
    for block, kept in zip(model.blocks, masks, strict=True):
        updated = torch.zeros(count, dtype=torch.bool)
        updated[list(kept)] = True
        if mode == "compact":
            bias = torch.zeros(count, count).masked_fill(~alive[None, :], float("-inf"))
            tokens = block(tokens, attn_mask=bias)
            alive = updated
        else:
            tokens = torch.where(updated[None, :, None], block(tokens), tokens)
        outputs.append(tokens)
    return outputs


def head_of(model: Any, tokens: Tensor) -> Tensor:
    """Logits of all N tokens by timm's own norm and head."""
    logits: Tensor = model.forward_head(model.norm(tokens))
    return logits
