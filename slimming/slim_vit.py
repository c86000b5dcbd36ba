"""``SlimViT``: the PyTorch reference of a model under a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimming.door import InputRejected
from slimming.plan import SlimPlan
from slimming.vit import check_supported, classify, embed, geometry_of, head_tokens_of, run_block


class SlimViT(nn.Module):
    """A timm ViT that computes, in each block, the tokens that the plan keeps and no others.

    It shares the given model's parameters. Tokens stay in their original order; nothing is sorted, so that it is an independent
    reference for the graph passes, which do sort. Raises ``InputRejected`` when the plan does not fit the model.
    """

    def __init__(self, model: Any, plan: SlimPlan) -> None:
        super().__init__()
        check_fits(model, plan)
        self.model = model
        self.stale = plan.mode == "stale"
        self.tokens = plan.tokens
        before = list(range(plan.tokens))
        for block, kept in enumerate(plan.kept):
            present = list(range(plan.tokens)) if self.stale else before
            position = {token: index for index, token in enumerate(present)}
            rows = torch.tensor([position[token] for token in kept])
            self.register_buffer(f"rows_{block}", rows, persistent=False)
            before = kept
        self.counts = plan.counts
        last = plan.kept[-1]
        head = plan.head_tokens if self.stale else [last.index(token) for token in plan.head_tokens]
        self.head_rows: Tensor
        self.register_buffer("head_rows", torch.tensor(head), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) -> logits (b, classes)."""
        tokens = embed(self.model, images)
        for index, block in enumerate(self.model.blocks):
            rows = getattr(self, f"rows_{index}")
            if self.counts[index] == tokens.shape[1]:
                tokens = run_block(block, tokens)
            elif self.stale:
                updated = run_block(block, tokens, rows)
                tokens = tokens.index_copy(1, rows, updated)
            else:
                tokens = run_block(block, tokens, rows)
        return classify(self.model, tokens[:, self.head_rows])


def check_fits(model: Any, plan: SlimPlan) -> None:
    """Raise ``InputRejected``, naming both sides, unless ``plan`` was made for a model shaped like ``model``."""
    check_supported(model, plan.model)
    patches = tuple(int(side) for side in model.patch_embed.grid_size)
    prefix = int(model.num_prefix_tokens)
    geometry = geometry_of(model)
    pairs = {
        "blocks": (plan.depth, len(model.blocks)),
        "tokens": (plan.tokens, prefix + patches[0] * patches[1]),
        "patch grid": (tuple(plan.grid), patches),
        "prefix tokens": (plan.prefix_tokens, prefix),
        "head tokens": (plan.head_tokens, head_tokens_of(model)),
        "token width": (plan.geometry.embed_dim, int(model.embed_dim)),
        "MLP width": (plan.geometry.mlp_hidden_dim, geometry.mlp_hidden_dim),
        "patch embedding's MACs": (plan.geometry.patch_macs, geometry.patch_macs),
        "head's MACs": (plan.geometry.head_macs, geometry.head_macs),
    }
    for what, (planned, actual) in pairs.items():
        if planned != actual:
            raise InputRejected(f"the plan was made for {plan.model} with {what} {planned}, the model has {actual}")
