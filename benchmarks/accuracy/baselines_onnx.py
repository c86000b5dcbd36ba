"""The baselines written for ONNX Runtime: the answers of ``benchmarks.accuracy.baselines``, from operators that it runs fast.

Exported as they stand, the baselines gather element by element (``GatherElements``) and merge by ``ScatterElements``. Here
whole rows are copied (``Gather`` over the flattened batch) and merged by a small matrix product, and nothing is gathered or
divided that stays as it is: what somebody would write who wants the baseline to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.accuracy.baselines import Baseline, EViT, ToMeViT


def rows_of(tokens: Tensor, places: Tensor) -> Tensor:
    """Of each image the tokens at its ``places``: (b, n, d) and (b, k) -> (b, k, d)."""
    batch, count, width = tokens.shape
    flat = places + count * torch.arange(batch, device=places.device)[:, None]
    return tokens.flatten(0, 1).index_select(0, flat.flatten()).reshape(batch, places.shape[1], width)


class LeanToMe(ToMeViT):
    """``ToMeViT`` with its merge in other operators."""

    def reduce(self, tokens: Tensor, sizes: Tensor | None, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """See ``ToMeViT.reduce``; edges go from the tokens at even positions, without the class token, to the odd ones."""
        unit = functional.normalize(metric, dim=-1)
        best, partner = (unit[:, 2::2] @ unit[:, 1::2].transpose(-2, -1)).max(-1)
        order = best.argsort(-1, descending=True)
        source = order[:, :r]
        stays = torch.zeros_like(partner[:, :1])  # the class token
        if r < order.shape[1]:
            stays = torch.cat([stays, 2 * order[:, r:].sort(-1).values + 2], dim=1)
        targets = torch.arange(tokens.shape[1] // 2, device=tokens.device)
        ties = (partner.gather(1, source)[:, None] == targets[None, :, None]).to(tokens.dtype)  # (b, |B|, r)
        if sizes is None:
            merged_sizes = 1 + ties.sum(-1)
            sums = tokens[:, 1::2] + ties @ rows_of(tokens, 2 * source + 2)
            stay_sizes = torch.ones_like(stays, dtype=tokens.dtype)
        else:
            merged_sizes = sizes[:, 1::2] + (ties @ sizes.gather(1, 2 * source + 2)[..., None])[..., 0]
            weighted = tokens * sizes[..., None]
            sums = weighted[:, 1::2] + ties @ rows_of(weighted, 2 * source + 2)
            stay_sizes = sizes.gather(1, stays)
        merged = torch.cat([rows_of(tokens, stays), sums / merged_sizes[..., None]], dim=1)
        return merged, torch.cat([stay_sizes, merged_sizes], dim=1)


class LeanEViT(EViT):
    """``EViT`` with its reorganisation in other operators."""

    def reorganise(self, tokens: Tensor, received: Tensor) -> Tensor:
        """See ``EViT.reorganise``."""
        kept = self.kept_of(tokens.shape[1])
        if kept == tokens.shape[1] - 1:
            return tokens
        weights, order = received.sort(-1, descending=True)
        parts = [tokens[:, :1], rows_of(tokens, order[:, :kept] + 1)]
        if self.fuse:
            weights = weights[:, None, kept:]
            weights = weights / weights.sum(-1, keepdim=True) if self.normalised else weights
            parts.append(weights @ rows_of(tokens, order[:, kept:] + 1))
        return torch.cat(parts, dim=1)


def lean(baseline: Baseline) -> Baseline:
    """The same baseline, sharing its parameters, in operators that ONNX Runtime runs fast."""
    if isinstance(baseline, ToMeViT):
        return LeanToMe(baseline.model, baseline.merged(), head_only=baseline.head_only)
    assert isinstance(baseline, EViT)
    options = {"fuse": baseline.fuse, "normalised": baseline.normalised, "head_only": baseline.head_only}
    return LeanEViT(baseline.model, baseline.keep_rate, baseline.blocks, **options)
