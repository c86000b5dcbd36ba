"""What a slimmed model learns from the dense one's blocks: each token as the mean of the dense tokens that it stands for.

The answers of a blend of two images say little; the features behind every block say what each of its tokens should be (FitNets,
Romero et al., 2015). A merged token's target is the mean of the dense tokens that went into it, as the closed-form fit has it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchslim.plan import SlimPlan
from slimming.models.attention import AttentionInput
from slimming.models.reader import ModelReader
from slimming.models.slim_vit import SlimViT
from slimming.models.token_cut import averages_of

_TINY = 1e-30


class SlimStreams(nn.Module):
    """A slimmed model that answers images with its logits and the tokens behind every cut block, as the plan keeps them."""

    def __init__(self, slim: SlimViT) -> None:
        super().__init__()
        self.slim = slim
        self.cut = _cut_blocks(slim.plan)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images (b, 3, h, w) -> logits (b, classes), and tokens (b, k, d) for each block from the first cut on."""
        slim = self.slim
        logits, streams = slim.logits_and_streams(images)
        found = []
        for block in self.cut:
            tokens = streams[block + 1]
            found.append(tokens[:, slim.plan.kept[block]] if slim.stale else tokens)
        return logits, found


class DenseTargets(nn.Module):
    """The dense model's logits, and its features as a plan's tokens should have them."""

    def __init__(self, model: nn.Module, plan: SlimPlan) -> None:
        super().__init__()
        self.model = model
        self.cut = _cut_blocks(plan)
        averages = averages_of(plan.kept, plan.tokens, plan.merged_into)
        for block in self.cut:
            self.register_buffer(f"average_{block}", averages[block], persistent=False)
        self.to(next(model.parameters()).device)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images (b, 3, h, w) -> logits (b, classes), and the tokens (b, k, d) that ``SlimStreams`` should give."""
        reader = ModelReader(self.model)
        tokens, found = reader.embed(images), []
        for index, (block, rope) in enumerate(zip(reader.blocks, reader.ropes(), strict=True)):
            tokens = block.run(AttentionInput(tokens, tokens, rope, rope))
            if index in self.cut:
                found.append(self.get_buffer(f"average_{index}") @ tokens.float())
        return reader.head.logits(tokens[:, reader.head.tokens]), found


def feature_loss(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Return ``||found - wanted||^2 / ||wanted||^2`` of an image's tokens, the mean over images and blocks: each (b, k, d).

    It is taken image by image, so that shares of a batch add up to the batch.
    """
    errors = []
    for tokens, target in zip(found, wanted, strict=True):
        missed, size = ((tokens.float() - target).square(), target.square())
        errors.append(missed.sum((1, 2)) / size.sum((1, 2)).clamp_min(_TINY))
    return torch.stack(errors).mean()


def _cut_blocks(plan: SlimPlan) -> list[int]:
    """The blocks whose output differs from the dense model's: from the first that drops a token on."""
    first = next((block for block, count in enumerate(plan.counts) if count < plan.tokens), plan.depth - 1)
    return list(range(first, plan.depth))
