"""How a timm Vision Transformer is read: which ones are understood, their geometry, and one block under a mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from slimming.door import InputRejected
from slimming.plan import Geometry


def check_supported(model: nn.Module, name: str) -> None:
    """Refuse, by name and reason, a model that is not a class-token or distilled ViT of plain blocks.

    Raises ``InputRejected``.
    """
    for reason in _unsupported(model):
        raise InputRejected(f"model {name}: {reason}; supported are timm's class-token and distilled VisionTransformers")


def _unsupported(model: Any) -> Iterator[str]:
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        yield f"its family {type(model).__name__} is not supported"
        return
    if model.global_pool != "token" or model.attn_pool is not None:
        yield f"its pooling {model.global_pool!r} is not supported"
    if model.dynamic_img_size:
        yield "dynamic_img_size gives every image its own token grid, and a static plan needs one"
    if type(model.patch_embed) is not PatchEmbed:
        yield f"its patch embedding {type(model.patch_embed).__name__} is not supported"
    elif model.patch_embed.proj.in_channels != 3:
        yield f"it takes {model.patch_embed.proj.in_channels} channels, and images are read as RGB"
    elif not model.patch_embed.num_patches:
        yield f"its image of {model.patch_embed.img_size} pixels holds no patch of {model.patch_embed.patch_size}"
    if not len(model.blocks):
        yield "it has no blocks"
    if not isinstance(model.head, nn.Linear):
        yield "it has no classifier head (num_classes=0)"
    for index, block in enumerate(model.blocks):
        if type(block) is not Block:
            yield f"block {index} is a {type(block).__name__}, not a pre-norm Block"
        elif type(block.attn) is not Attention:
            yield f"block {index}'s attention {type(block.attn).__name__} is not supported"
        elif block.attn.gate is not None or not isinstance(block.attn.norm, nn.Identity):
            yield f"block {index}'s gated or normalised attention output is not supported"
        elif type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
            yield f"block {index}'s MLP {type(block.mlp).__name__} is not supported"


def geometry_of(model: Any) -> Geometry:
    """The sizes behind the analytic MAC count of a supported model."""
    width = int(model.embed_dim)
    kernel = model.patch_embed.proj.weight
    heads = [model.head, *([model.head_dist] if isinstance(model, VisionTransformerDistilled) else [])]
    return Geometry(
        embed_dim=width,
        mlp_hidden_dim=int(model.blocks[0].mlp.fc1.out_features),
        patch_macs=int(model.patch_embed.num_patches) * kernel.numel(),
        head_macs=sum(int(head.weight.numel()) for head in heads),
    )


def head_tokens_of(model: nn.Module) -> list[int]:
    """Indices of the tokens that the head reads: the class token, and the distillation token where there is one."""
    return [0, 1] if isinstance(model, VisionTransformerDistilled) else [0]


def embed(model: Any, images: Tensor) -> Tensor:
    """Images (b, 3, h, w) -> the first block's input (b, N, d), prefix tokens first."""
    tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    return tokens


def classify(model: Any, tokens: Tensor) -> Tensor:
    """The last block's output (b, at least the head's tokens, d) -> logits (b, classes)."""
    logits: Tensor = model.forward_head(model.norm(tokens))
    return logits


def _heads(projected: Tensor, attention: Any) -> Tensor:
    return projected.reshape(*projected.shape[:-1], attention.num_heads, attention.head_dim).transpose(1, 2)


def _project(attention: Any, tokens: Tensor, part: int) -> Tensor:
    """Queries (part 0), keys (1) or values (2) of ``tokens`` (b, n, d): (b, heads, n, head width), normalised if they are."""
    rows = slice(part * attention.attn_dim, (part + 1) * attention.attn_dim)
    bias = attention.qkv.bias
    heads = _heads(functional.linear(tokens, attention.qkv.weight[rows], None if bias is None else bias[rows]), attention)
    norms = (attention.q_norm, attention.k_norm)
    return norms[part](heads) if part < 2 else heads


def attention_maps(block: Any, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
    """Softmax matrices P (b, heads, queries, n) of a block whose input is ``tokens`` (b, n, d).

    ``rows`` are the positions of the queries within ``tokens``; None queries all of them.
    """
    normed = block.norm1(tokens)
    queries = normed if rows is None else normed[:, rows]
    scaled = _project(block.attn, queries, 0) * block.attn.scale
    maps: Tensor = (scaled @ _project(block.attn, normed, 1).transpose(-2, -1)).softmax(-1)
    return maps


def run_block(block: Any, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
    """One block with rectangular attention (METHOD.md, "what a slimmed block computes").

    ``tokens`` (b, n, d) is all that the block may read; ``rows`` are the positions whose output it computes, None for all.
    Returns (b, rows, d).
    """
    attention = block.attn
    normed = block.norm1(tokens)
    queried, shortcut = (normed, tokens) if rows is None else (normed[:, rows], tokens[:, rows])
    query, key, value = _project(attention, queried, 0), _project(attention, normed, 1), _project(attention, normed, 2)
    if attention.fused_attn:
        mixed = functional.scaled_dot_product_attention(query, key, value)
    else:
        mixed = ((query * attention.scale) @ key.transpose(-2, -1)).softmax(-1) @ value
    attended: Tensor = shortcut + block.ls1(attention.proj(mixed.transpose(1, 2).flatten(2)))
    output: Tensor = attended + block.ls2(block.mlp(block.norm2(attended)))
    return output
