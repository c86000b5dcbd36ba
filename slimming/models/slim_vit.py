"""``SlimViT``: the PyTorch reference of a model under a plan."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from patchslim.errors import InputRejected
from patchslim.plan import SlimPlan
from slimming.models.blocks import BlockReader
from slimming.models.reader import ModelReader, reader_of
from slimming.models.token_cut import Cut, cuts_of, split


class SlimViT(nn.Module):
    """A timm ViT that computes, in each block, the tokens that the plan keeps and no others.

    It shares the given model's parameters. Tokens stay in their original order; nothing is sorted, so that it is an independent
    reference for the graph passes, which do sort. Raises ``InputRejected`` when the plan does not fit the model.
    """

    def __init__(self, model: nn.Module, plan: SlimPlan) -> None:
        super().__init__()
        check_fits(model, plan)
        self.model = model
        self.plan = plan
        self.stale = plan.mode == "stale"
        everything = list(range(plan.tokens))
        self.cuts = nn.ModuleList(cuts_of(plan.kept, plan.tokens, plan.mode, plan.merged_into))
        reads = ModelReader(model).head.tokens
        self.head_rows: Tensor
        given = set(plan.kept[-1]) & set(reads)
        self.register_buffer("head_rows", split(everything if self.stale else plan.kept[-1], given)[0], persistent=False)
        self.to(next(model.parameters()).device)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (b, classes) of images (b, 3, h, w)."""
        reader = ModelReader(self.model)  # made anew: a copy of this module must read the copy's layers
        *_, tokens = self._walk(reader, images)
        return self._logits(reader, tokens)

    def logits_and_streams(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits, and what ``streams`` returns."""
        reader = ModelReader(self.model)
        streams = list(self._walk(reader, images))
        return self._logits(reader, streams[-1]), streams

    def streams(self, images: Tensor) -> list[Tensor]:
        """Return the residual stream behind 0, 1, ... blocks: tokens (b, n, d) in their original order."""
        return list(self._walk(ModelReader(self.model), images))

    def _logits(self, reader: ModelReader, tokens: Tensor) -> Tensor:
        return reader.head.logits(tokens.index_select(1, self.head_rows))

    def _walk(self, reader: ModelReader, images: Tensor) -> Iterator[Tensor]:
        tokens, ropes = reader.embed(images), reader.ropes()
        yield tokens
        for block, cut, rope in zip(reader.blocks, self.cuts, ropes, strict=True):
            assert isinstance(cut, Cut)  # a ModuleList does not know
            tokens = self._block(block, cut, tokens, rope)
            yield tokens

    def _block(self, block: BlockReader, cut: Cut, tokens: Tensor, rope: Tensor | None) -> Tensor:
        result = block.run(cut.view(tokens, rope))
        return tokens.index_copy(1, cut.rows, result) if self.stale and cut.drops else result


def check_fits(model: nn.Module, plan: SlimPlan) -> None:
    """Raise ``InputRejected``, naming both sides, unless ``plan`` was made for a model shaped like ``model``."""
    reader = reader_of(model, plan.model)
    geometry = reader.geometry()
    pairs = {
        "blocks": (plan.depth, len(reader.blocks)),
        "tokens": (plan.tokens, reader.tokens),
        "patch grid": (tuple(plan.grid), reader.grid),
        "prefix tokens": (plan.prefix_tokens, reader.prefix),
        "pooling": (plan.pooling, reader.head.pooling),
        "head tokens": (plan.head_tokens, reader.head.tokens if reader.head.fixed else []),
        "token width": (plan.geometry.embed_dim, geometry.embed_dim),
        "MLP width": (plan.geometry.mlp_hidden_dim, geometry.mlp_hidden_dim),
        "patch embedding's MACs": (plan.geometry.patch_macs, geometry.patch_macs),
        "head's MACs": (plan.geometry.head_macs, geometry.head_macs),
        "geometry": (plan.geometry, geometry),
    }
    for what, (planned, actual) in pairs.items():
        if planned != actual:
            raise InputRejected(f"the plan was made for {plan.model} with {what} {planned}, the model has {actual}")
    if not set(plan.kept[-1]) & set(reader.head.tokens):
        raise InputRejected(f"the plan keeps no token in the last block that {plan.model}'s head reads")
