"""How a model's head reads the last block's tokens: a class token, an average, or an attention pool."""

from __future__ import annotations

import torch
from timm.layers import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchslim.choices import Pooling


class HeadReader:
    """The final norm, the pooling and the classifier.

    ``pooling`` is timm's ``global_pool``; ``tokens`` are all original tokens that the head reads. A head with pooling ``token``
    needs every one of them; the others accept any non-empty part.
    """

    def __init__(self, model: VisionTransformer | Eva) -> None:
        self.model = model
        self.pooling: Pooling = "map" if model.attn_pool is not None else model.global_pool
        prefix = int(model.num_prefix_tokens)
        if self.pooling == "token":
            self.tokens = [0, 1] if isinstance(model, VisionTransformerDistilled) else [0]
        else:
            whole = isinstance(model, Eva) and self.pooling == "map"
            first = 0 if whole or getattr(model, "pool_include_prefix", False) else prefix
            self.tokens = list(range(first, prefix + int(model.patch_embed.num_patches)))

    @property
    def fixed(self) -> bool:
        """Whether the head needs every token that it reads."""
        return self.pooling == "token"

    @property
    def beside(self) -> list[int]:
        """None: no timm head reads single tokens beside its pool."""
        return []

    def pooled(self, tokens: Tensor) -> Tensor:
        """Return the pooled feature (b, width) of the tokens that the head is given, (b, k, d) as the last block left them."""
        normed: Tensor = self.model.norm(tokens)
        if self.pooling == "token":
            return normed.flatten(1)
        pooled: Tensor = normed.mean(dim=1) if self.pooling == "avg" else self.model.attn_pool(normed)
        return pooled

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits (b, classes) of the tokens that the head is given, (b, k, d), in original order."""
        model = self.model
        if self.pooling == "token":
            logits: Tensor = model.forward_head(model.norm(tokens))
        else:
            logits = model.head(model.head_drop(model.fc_norm(self.pooled(tokens))))
        return logits

    def weights(self, tokens: Tensor) -> Tensor:
        """Return how the pooled feature depends on each given token (b, k, r): its weight, or a column per needed token."""
        batch, count = tokens.shape[:2]
        if self.pooling == "token":
            return torch.eye(count, device=tokens.device).expand(batch, count, count)
        if self.pooling == "avg":
            return torch.full((batch, count, 1), 1 / count, device=tokens.device)
        pool = self.model.attn_pool
        normed = self.model.norm(tokens)
        query = pool.q(pool.latent).unflatten(-1, (pool.num_heads, pool.head_dim)).transpose(1, 2)
        key = (
            pool.kv(normed)[..., : pool.num_heads * pool.head_dim]
            .unflatten(-1, (pool.num_heads, pool.head_dim))
            .transpose(1, 2)
        )
        maps = ((pool.q_norm(query) * pool.scale) @ pool.k_norm(key).transpose(-2, -1)).softmax(-1)
        weights: Tensor = maps.mean(dim=1).mean(dim=1)[..., None]
        return weights

    def macs(self) -> tuple[int, int]:
        """Return the head's MACs per image, and those per token that it is given."""
        model = self.model
        heads = [model.head, *([model.head_dist] if isinstance(model, VisionTransformerDistilled) else [])]
        total = sum(int(head.weight.numel()) for head in heads)
        if self.pooling != "map":
            return total, 0
        pool = model.attn_pool
        latents, width = int(pool.latent_len), int(pool.num_heads * pool.head_dim)
        once = [layer for part in (pool.q, pool.proj, pool.mlp) if part is not None for layer in part.modules()]
        total += latents * sum(int(layer.weight.numel()) for layer in once if isinstance(layer, nn.Linear))
        return total, int(pool.kv.weight.numel()) + 2 * latents * width


def head_fault(model: VisionTransformer | Eva) -> str:
    """Return why a model's head cannot be read; "" where it can."""
    if model.attn_pool is not None:
        if type(model.attn_pool) is not AttentionPoolLatent or model.attn_pool.pos_embed is not None:
            return f"its attention pool {type(model.attn_pool).__name__} is not supported"
        if model.attn_pool.pool not in ("token", "avg"):
            return f"its attention pool's own pooling {model.attn_pool.pool!r} is not supported"
    elif model.global_pool not in ("token", "avg"):
        return f"its pooling {model.global_pool!r} is not supported"
    if not isinstance(model.head, nn.Linear):
        return "it has no classifier head (num_classes=0)"
    return ""
