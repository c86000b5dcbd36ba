"""How timm's attention modules are read: projections of chosen tokens, softmax maps, and what the output projection sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class TokenMix:
    """Constant sums of tokens: ``own`` (k, 1) times the ``rows`` (k,), and ``taken`` (k, r) times the rows ``dropped`` (r,)."""

    rows: Tensor
    dropped: Tensor
    own: Tensor
    taken: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the sums (b, k, c) of tokens (b, n, c)."""
        own, taken = self.own.to(tokens.dtype), self.taken.to(tokens.dtype)
        return tokens.index_select(1, self.rows) * own + taken @ tokens.index_select(1, self.dropped)


@dataclass(frozen=True)
class AttentionInput:
    """What one block is given: the tokens that it may read, and those whose output it computes.

    ``read`` is (b, n, d), ``queried`` (b, k, d); ``rope`` and ``queried_rope`` are the rotary tables of their positions, (n, c)
    or (heads, n, c), None without RoPE; ``key_bias`` (n,) is added to every query's logits. ``mix`` makes the queried tokens of
    the read ones, where they are not simply some of them: before and after a norm alike.
    """

    read: Tensor
    queried: Tensor
    rope: Tensor | None = None
    queried_rope: Tensor | None = None
    key_bias: Tensor | None = None
    sink: list[Tensor] | None = None  # the softmax maps that a run computes are appended here
    mix: TokenMix | None = None

    def normed(self, norm: Callable[[Tensor], Tensor]) -> AttentionInput:
        """Return the same view after a token-wise normalisation."""
        read = norm(self.read)
        same = self.queried is self.read
        queried = self.mix(read) if self.mix is not None else read if same else norm(self.queried)
        return AttentionInput(read, queried, self.rope, self.queried_rope, self.key_bias, self.sink, self.mix)


class AttentionReader:
    """One attention module with its q, k and v made alike, whichever way it stores them.

    ``heads`` of width ``head_dim``; ``output`` is the projection W_o. Grouped keys and values are repeated to one per head.
    """

    def __init__(self, module: Attention | AttentionRope | EvaAttention) -> None:
        self.module = module
        self.heads = int(module.num_heads)
        self.head_dim = int(module.head_dim)
        self.output: nn.Linear = module.proj

    @property
    def packed(self) -> bool:
        """Whether queries, keys and values come from one projection."""
        return self.module.qkv is not None

    def _projected(self, tokens: Tensor, part: int) -> Tensor:
        """q (part 0), k (1) or v (2) of ``tokens`` before norms and rotation: (b, n, width)."""
        module = self.module
        if module.qkv is None:
            projected: Tensor = (module.q_proj, module.k_proj, module.v_proj)[part](tokens)
            return projected
        width = self.heads * self.head_dim
        rows = slice(part * width, (part + 1) * width)
        if isinstance(module, EvaAttention):
            bias = (module.q_bias, module.k_bias, module.v_bias)[part]
        else:
            bias = None if module.qkv.bias is None else module.qkv.bias[rows]
        return functional.linear(tokens, module.qkv.weight[rows], bias)

    def _heads(self, tokens: Tensor, part: int, rope: Tensor | None) -> Tensor:
        projected = self._projected(tokens, part)
        heads: Tensor = projected.reshape(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)
        if part < 2:
            heads = (self.module.q_norm, self.module.k_norm)[part](heads)
            if rope is not None:
                half = getattr(self.module, "rotate_half", False)
                heads = apply_rot_embed_cat(heads, rope, half=half).type_as(projected)
        return heads if heads.shape[1] == self.heads else heads.repeat_interleave(self.heads // heads.shape[1], dim=1)

    def _scores(self, view: AttentionInput) -> Tensor:
        query = self._heads(view.queried, 0, view.queried_rope) * self.module.scale
        scores: Tensor = query @ self._heads(view.read, 1, view.rope).transpose(-2, -1)
        return scores if view.key_bias is None else scores + view.key_bias

    def maps(self, view: AttentionInput) -> Tensor:
        """Return the softmax matrices P (b, heads, k, n) of normalised tokens."""
        return self._scores(view).softmax(-1)

    def finish(self, mixed: Tensor, queried: Tensor) -> Tensor:
        """Return what the output projection reads (b, k, heads * head_dim) of ``P V`` (b, heads, k, head_dim)."""
        flat: Tensor = self.module.norm(mixed.transpose(1, 2).flatten(2))
        return flat if self.module.gate is None else flat * self.module.gate(queried).sigmoid()

    def values(self, view: AttentionInput) -> Tensor:
        """Return the values V (b, heads, n, head_dim) of normalised tokens."""
        return self._heads(view.read, 2, None)

    def inner(self, view: AttentionInput) -> Tensor:
        """Return what the output projection reads, from normalised tokens: (b, k, heads * head_dim)."""
        if view.sink is not None or not self.module.fused_attn:
            maps = self.maps(view)
            if view.sink is not None:
                view.sink.append(maps)
            return self.finish(maps @ self.values(view), view.queried)
        query, key = self._heads(view.queried, 0, view.queried_rope), self._heads(view.read, 1, view.rope)
        bias = None if view.key_bias is None else view.key_bias.expand(query.shape[-2], -1).to(query.dtype)
        mixed = functional.scaled_dot_product_attention(
            query, key, self.values(view), attn_mask=bias, scale=float(self.module.scale)
        )
        return self.finish(mixed, view.queried)

    def macs(self) -> tuple[int, int]:
        """Return the widths of the queries (and of the mix), and of the keys (and the values)."""
        module = self.module
        width = self.heads * self.head_dim
        return width, width if self.packed else int(module.k_proj.out_features)


class ParallelReader(AttentionReader):
    """The attention inside timm's ``ParallelScalingBlock``, whose one input projection also feeds the MLP."""

    def __init__(self, block: ParallelScalingBlock) -> None:
        self.module = block
        self.heads = int(block.num_heads)
        self.head_dim = int(block.head_dim)

    @property
    def packed(self) -> bool:
        """They do, and the MLP's hidden layer with them."""
        return True

    def _projected(self, tokens: Tensor, part: int) -> Tensor:
        hidden, width = self.module.in_split[:2]
        rows = slice(hidden + part * width, hidden + (part + 1) * width)
        bias = self.module.in_proj.bias
        return functional.linear(tokens, self.module.in_proj.weight[rows], None if bias is None else bias[rows])

    def finish(self, mixed: Tensor, queried: Tensor) -> Tensor:
        """Return ``P V`` with the heads side by side; there is no norm and no gate."""
        return mixed.transpose(1, 2).flatten(2)

    def macs(self) -> tuple[int, int]:
        """Return the widths of queries and keys, as for any other attention."""
        return self.heads * self.head_dim, self.heads * self.head_dim


KNOWN = (Attention, AttentionRope, EvaAttention)


def attention_fault(module: nn.Module) -> str:
    """Return why an attention module cannot be read; "" where it can."""
    if type(module) not in KNOWN:
        return f"attention {type(module).__name__} is not supported"
    if not isinstance(module.proj, nn.Linear):
        return f"output projection {type(module.proj).__name__} is not supported"
    return ""


def identity_rope(table: Tensor, prefix: int) -> Tensor:
    """Return ``table`` (..., patches, c), sines then cosines, after ``prefix`` positions that are not rotated."""
    sine, cosine = table[..., :1, :].chunk(2, dim=-1)
    still = torch.cat([torch.zeros_like(sine), torch.ones_like(cosine)], dim=-1)
    return torch.cat([still.expand(*table.shape[:-2], prefix, -1), table], dim=-2)
