"""Training-free implementations of two baselines that choose tokens at run time, image by image: ToMe and EViT.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461), and Liang et al., "Not All Patches are What
You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022 (arXiv 2202.07800). Our own code; where the
papers are silent (order after merging, rounding, caps) it does as the authors' code does. They are for accuracy at a counted
cost, not for speed. Costs follow ``patchslim.plan.macs_of``.

In neither paper does the last block skip the patches, which no class-token head reads; ``head_only`` gives the baselines that
exact saving too, so that it is not counted as a merit of a plan that has it. It is off unless asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from patchslim.errors import BudgetUnreachable, InputRejected, UsageError
from slimming.models.reader import reader_of

#: Where the EViT paper shrinks a 12-block model, counting from 1.
EVIT_BLOCKS_OF_12 = (4, 7, 10)


def attend(block: Any, tokens: Tensor, sizes: Tensor | None = None, head_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Attention branch and shortcut of a timm block; ``tokens`` (b, n, d), ``sizes`` (b, n) the patches that each stands for.

    Returns the tokens (b, q, d), the softmax matrices (b, heads, q, n) and the keys (b, heads, n, head width); q is n, or 1
    with ``head_only``. With sizes this is ToMe's proportional attention, softmax(Q K^T / sqrt(d_h) + log s) (its Eq. 1).
    """
    attention = block.attn
    normed = block.norm1(tokens)

    def split(projected: Tensor) -> Any:
        heads = projected.reshape(*projected.shape[:2], -1, attention.num_heads, attention.head_dim)
        return heads.permute(2, 0, 3, 1, 4)

    if head_only:
        width, weight, bias = attention.attn_dim, attention.qkv.weight, attention.qkv.bias
        first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
        (query,) = split(functional.linear(normed[:, :1], weight[:width], first))
        key, value = split(functional.linear(normed, weight[width:], rest))
    else:
        query, key, value = split(attention.qkv(normed))
    query, key = attention.q_norm(query), attention.k_norm(key)
    logits = (query * attention.scale) @ key.transpose(-2, -1)
    if sizes is not None:
        logits = logits + sizes.log()[:, None, None]
    maps = logits.softmax(-1)
    mixed = attention.proj((maps @ value).transpose(1, 2).flatten(2))
    return tokens[:, : mixed.shape[1]] + block.ls1(mixed), maps, key


def feed(block: Any, tokens: Tensor) -> Tensor:
    """MLP branch and shortcut of a timm block."""
    output: Tensor = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return output


def bipartite_soft_matching(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which r tokens to merge into which (ToMe, section 3, "Bipartite Soft Matching"); ``metric`` (b, n, c), class token first.

    Tokens alternate into A (even positions) and B (odd); each of A is tied to the most similar of B by cosine; the r tightest
    ties are kept. The class token is in A and never tied. Returns the sorted indices into A of those that stay (b, |A| - r),
    and the ties: indices into A (b, r) and into B (b, r).
    """
    unit = functional.normalize(metric, dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(-2, -1)
    scores[:, 0] = -math.inf
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    source = order[:, :r]
    return order[:, r:].sort(-1).values, source, partner.gather(1, source)


def merge(tokens: Tensor, sizes: Tensor, matching: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge tied tokens (b, n, d) into the average weighted by ``sizes`` (b, n): (b, n - r, d) and their sizes (b, n - r).

    What stays of A comes first, then B, as in the paper; the order decides the next block's A and B.
    """
    stays, source, target = matching
    sums = torch.cat([tokens * sizes[..., None], sizes[..., None]], dim=-1)
    a, b = sums[:, ::2], sums[:, 1::2]
    width = sums.shape[-1]
    moved = a.gather(1, source[..., None].expand(-1, -1, width))
    b = b.scatter_add(1, target[..., None].expand(-1, -1, width), moved)
    merged = torch.cat([a.gather(1, stays[..., None].expand(-1, -1, width)), b], dim=1)
    return merged[..., :-1] / merged[..., -1:], merged[..., -1]


class Baseline(nn.Module):
    """A class-token timm ViT whose blocks pass on fewer tokens than they read; it shares the model's parameters.

    ``counts`` are the tokens after each block's attention, which its MLP and the next block see. Raises ``InputRejected`` for a
    model that is not supported, or has prefix tokens besides the class token.
    """

    def __init__(self, model: Any, head_only: bool) -> None:
        super().__init__()
        reader_of(model, type(model).__name__)
        for index, block in enumerate(model.blocks):
            plain = (
                type(block) is Block
                and type(block.attn) is Attention
                and block.attn.gate is None
                and isinstance(block.attn.norm, nn.Identity)
            )
            if not plain:
                raise InputRejected(
                    f"the baselines take plain pre-norm blocks; block {index} is not one: {type(block).__name__}"
                )
        if model.num_prefix_tokens != 1 or model.global_pool != "token":
            raise InputRejected(
                "the baselines take one class token that the head reads; the model has "
                f"{model.num_prefix_tokens} prefix tokens and pooling {model.global_pool!r}"
            )
        self.model = model
        self.head_only = head_only
        self.tokens = 1 + int(model.patch_embed.num_patches)
        self.depth = len(model.blocks)
        self.counts: list[int] = []

    def settle(self, counts: list[int]) -> None:
        """Set the token counts; with ``head_only`` the last block has the class token alone, whatever was asked of it."""
        self.counts = [*counts[:-1], 1] if self.head_only else counts

    def macs(self) -> int:
        """Multiply-accumulates of one image, patch embedding and head included; choosing, merging and fusing are not."""
        geometry = reader_of(self.model).geometry()
        d, hidden = geometry.embed_dim, geometry.mlp_hidden_dim
        total = geometry.patch_macs + geometry.head_macs
        for block, (read, passed) in enumerate(pairwise([self.tokens, *self.counts])):
            queries = 1 if self.is_cut(block) else read
            total += 2 * queries * d * d + 2 * read * d * d + 2 * queries * read * d + 2 * passed * d * hidden
        return total

    def is_cut(self, block: int) -> bool:
        """Whether ``block`` (from 0) computes the class token alone."""
        return self.head_only and block == self.depth - 1


class ToMeViT(Baseline):
    """ToMe: each block merges r tokens (one number, or one for each block) into their most similar ones, after its attention.

    A block merges at most half of its tokens, the class token aside. Raises ``InputRejected`` and ``UsageError``.
    """

    def __init__(self, model: Any, r: int | Sequence[int], *, head_only: bool = False) -> None:
        super().__init__(model, head_only)
        schedule = [r] * self.depth if isinstance(r, int) else list(r)
        if len(schedule) != self.depth or min(schedule) < 0:
            raise UsageError(f"r must be one number from 0 up, or one for each of {self.depth} blocks; it is {r}")
        counts = [self.tokens]
        for wanted in schedule:
            counts.append(counts[-1] - min(wanted, (counts[-1] - 1) // 2))
        self.settle(counts[1:])

    def merged(self) -> list[int]:
        """Tokens that each block merges away."""
        before = [self.tokens, *self.counts]
        return [0 if self.is_cut(block) else before[block] - before[block + 1] for block in range(self.depth)]

    def matching_macs(self) -> int:
        """Multiply-accumulates of the similarities of one image, which ``macs`` leaves out."""
        sides = [(n, r) for n, r in zip([self.tokens, *self.counts], self.merged(), strict=False) if r]
        return sum(-(-n // 2) * (n // 2) for n, _ in sides) * int(self.model.blocks[0].attn.head_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) -> logits (b, classes)."""
        tokens, sizes = reader_of(self.model).embed(images), None
        for index, (block, r) in enumerate(zip(self.model.blocks, self.merged(), strict=True)):
            tokens, _, keys = attend(block, tokens, sizes, self.is_cut(index))
            if r:
                tokens, sizes = self.reduce(tokens, sizes, keys.mean(1), r)
            tokens = feed(block, tokens)
        return reader_of(self.model).head.logits(tokens[:, :1])

    def reduce(self, tokens: Tensor, sizes: Tensor | None, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """Merge r of the tokens (b, n, d) of ``sizes`` (b, n), None where each is one patch, by ``metric`` (b, n, c)."""
        sizes = torch.ones_like(tokens[..., 0]) if sizes is None else sizes
        return merge(tokens, sizes, bipartite_soft_matching(metric, r))


class EViT(Baseline):
    """EViT: some blocks keep, after attention, the patches that the class token attends to most, and fuse the rest into one.

    ``keep_rate`` is the part of the tokens, the class token aside, that each of ``blocks`` keeps, rounded up; the fused token
    is one of them for the next. ``blocks`` count from 1; None means 4, 7 and 10 of 12 as in the paper, and the nearest places
    in proportion in another depth: 3, 5 and 7 of 8. The fused token is the paper's sum of a_i x_i over what is not kept, a the
    class token's attention averaged over heads. The paper calls it a weighted average, though these a_i do not add up to 1;
    ``normalised`` divides by their sum. Raises ``InputRejected`` and ``UsageError``.
    """

    def __init__(
        self,
        model: Any,
        keep_rate: float,
        blocks: Sequence[int] | None = None,
        fuse: bool = True,
        *,
        normalised: bool = False,
        head_only: bool = False,
    ) -> None:
        super().__init__(model, head_only)
        if not 0 < keep_rate <= 1:
            raise UsageError(f"keep_rate must be above 0 and at most 1; it is {keep_rate}")
        places = {(2 * place * self.depth + 12) // 24 for place in EVIT_BLOCKS_OF_12} if blocks is None else set(blocks)
        if blocks is not None and not places <= set(range(1, self.depth + 1)):
            raise UsageError(f"blocks must be within 1 to {self.depth}; they are {list(blocks)}")
        self.keep_rate, self.fuse, self.normalised = keep_rate, fuse, normalised
        self.blocks = sorted(places - {0})
        counts = [self.tokens]
        for block in range(self.depth):
            kept = self.kept_of(counts[-1]) if block + 1 in self.blocks else counts[-1] - 1
            counts.append(counts[-1] if kept == counts[-1] - 1 else 1 + kept + fuse)
        self.settle(counts[1:])

    def kept_of(self, tokens: int) -> int:
        """Patches (and earlier fused tokens) that a shrinking block keeps of ``tokens``, the class token not counted."""
        return math.ceil(self.keep_rate * (tokens - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) -> logits (b, classes)."""
        tokens = reader_of(self.model).embed(images)
        for index, block in enumerate(self.model.blocks):
            tokens, maps, _ = attend(block, tokens, None, self.is_cut(index))
            if index + 1 in self.blocks and not self.is_cut(index):
                tokens = self.reorganise(tokens, maps[:, :, 0, 1:].mean(1))
            tokens = feed(block, tokens)
        return reader_of(self.model).head.logits(tokens[:, :1])

    def reorganise(self, tokens: Tensor, received: Tensor) -> Tensor:
        """Keep and fuse tokens (b, n, d) by the class token's attention ``received`` by all but itself (b, n - 1)."""
        kept = self.kept_of(tokens.shape[1])
        if kept == tokens.shape[1] - 1:
            return tokens
        order = received.argsort(-1, descending=True)
        ranked = tokens[:, 1:].gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
        parts = [tokens[:, :1], ranked[:, :kept]]
        if self.fuse:
            weights = received.gather(1, order)[:, kept:, None]
            weights = weights / weights.sum(1, keepdim=True) if self.normalised else weights
            parts.append((weights * ranked[:, kept:]).sum(1, keepdim=True))
        return torch.cat(parts, dim=1)


def tome_for_macs(model: Any, macs: int, *, head_only: bool = False) -> ToMeViT:
    """The ToMe whose cost is nearest to ``macs`` from below; raises ``BudgetUnreachable``.

    The paper's r is one integer; here the first j blocks may merge r + 1 and the others r, for the budgets between two r.
    """
    depth, most = len(model.blocks), int(model.patch_embed.num_patches) // 2
    baseline = ToMeViT(model, 0, head_only=head_only)
    for total in range(1, depth * most + 1):  # the cost falls as the total grows
        if baseline.macs() <= macs:
            break
        r, more = divmod(total, depth)
        baseline = ToMeViT(model, [r + (block < more) for block in range(depth)], head_only=head_only)
    if baseline.macs() > macs:
        raise BudgetUnreachable(f"ToMe cannot do with {macs} MACs; its least here is {baseline.macs()}")
    return baseline


def evit_for_macs(model: Any, macs: int, **options: Any) -> EViT:
    """The EViT whose keep rate, found by bisection, costs nearest to ``macs`` from below; raises ``BudgetUnreachable``.

    ``options`` are those of ``EViT``. The rate is written with as few digits as give the same token counts.
    """
    if (dense := EViT(model, 1.0, **options)).macs() <= macs:
        return dense
    low, high = 1 / dense.tokens, 1.0  # the lowest keeps one patch
    if (least := EViT(model, low, **options)).macs() > macs:
        raise BudgetUnreachable(f"EViT at blocks {least.blocks} cannot do with {macs} MACs; its least here is {least.macs()}")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if EViT(model, middle, **options).macs() <= macs else (low, middle)
    best = EViT(model, low, **options)
    shorter = (
        EViT(model, rate, **options) for digits in range(1, 12) if (rate := math.floor(low * 10**digits) / 10**digits) > 0
    )
    return next((baseline for baseline in shorter if baseline.counts == best.counts), best)
