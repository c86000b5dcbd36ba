"""Multiply-accumulates (MACs) of a Vision Transformer under a plan, counted analytically."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated

from pydantic import Field

from patchslim.choices import Layout, Mode
from patchslim.records import Count, StrictRecord


def check_counts(counts: Sequence[int], tokens: int, depth: int) -> None:
    """Raise ``ValueError`` unless ``counts`` are ``depth`` nested token counts, from ``tokens`` down to at least 1."""
    if len(counts) != depth:
        raise ValueError(f"{len(counts)} token counts for {depth} blocks")
    before = tokens
    for block, count in enumerate(counts):
        if not 1 <= count <= before:
            raise ValueError(f"block {block} cannot output {count} tokens when it is given {before}")
        before = count


class Geometry(StrictRecord):
    """The sizes that the analytic MAC count needs, as timm names them."""

    embed_dim: Count = Field(description="token width d")
    mlp_hidden_dim: Count = Field(description="width d' of the MLP's hidden layer")
    patch_macs: Annotated[int, Field(ge=0, le=1 << 53)] = Field(description="MACs of the patch embedding, whole image")
    head_macs: Annotated[int, Field(ge=0, le=1 << 53)] = Field(
        description="MACs of the classifier head or heads, once per image"
    )
    attn_dim: Count | None = Field(default=None, description="width of all queries, where it is not embed_dim")
    key_dim: Count | None = Field(default=None, description="width of all keys and of all values, where it is not attn_dim")
    mlp_macs: Count | None = Field(default=None, description="MACs of the MLP per token, where they are not 2 d d'")
    gate: bool = Field(default=False, description="whether the attention's output is gated")
    packed_qkv: bool = Field(default=True, description="whether queries, keys and values come from one projection")
    packed_mlp_dim: Annotated[int, Field(ge=0, le=1 << 53)] = Field(
        default=0, description="width of that projection which goes to the MLP's hidden layer"
    )
    attention_norms: Annotated[int, Field(ge=0, le=1 << 53)] = Field(
        default=1, description="norms in front of a block's attentions: none where they come after, several side by side"
    )
    pool_macs: Annotated[int, Field(ge=0, le=1 << 53)] = Field(
        default=0, description="MACs of an attention pool per token that it reads"
    )
    pool_tokens: Annotated[int, Field(ge=0, le=1 << 53)] = Field(
        default=0, description="tokens that the attention pool can read"
    )


def macs_of(
    counts: list[int],
    tokens: int,
    geometry: Geometry,
    mode: Mode = "compact",
    layout: Layout = "split",
    pool_reads: int | None = None,
    merging: Collection[int] = (),
) -> int:
    """Return the MACs of one image whose block l outputs ``counts[l]`` of ``tokens`` tokens; biases and norms count zero.

    ``layout`` is that of a cut block's projections. ``split``: queries are computed for the kept tokens only. ``packed``: one
    qkv projection runs over every token that the block reads, so the dropped tokens' queries are computed too, and what of the
    MLP is projected with them. ``pool_reads`` of the last block's tokens go to an attention pool; None: as many as it can
    read. The blocks ``merging`` add the tokens that they drop to those that they keep. In ``split`` layout that is a product
    with a constant matrix, for the shortcut and behind each norm; in ``packed`` layout sums of rows, which count zero.
    """
    reads = min(counts[-1], geometry.pool_tokens) if pool_reads is None else pool_reads
    ends = geometry.patch_macs + geometry.head_macs + geometry.pool_macs * reads
    return ends + sum(block_macs_of(counts, tokens, geometry, mode, layout, merging))


def block_macs_of(
    counts: list[int],
    tokens: int,
    geometry: Geometry,
    mode: Mode = "compact",
    layout: Layout = "split",
    merging: Collection[int] = (),
) -> list[int]:
    """Return the MACs of each block, first to last, as ``macs_of`` counts them."""
    d = geometry.embed_dim
    query = geometry.attn_dim or d
    key = geometry.key_dim or query
    mlp = geometry.mlp_macs or 2 * d * geometry.mlp_hidden_dim
    found = []
    for block, k in enumerate(counts):
        before = tokens if block == 0 else counts[block - 1]
        n_in = tokens if mode == "stale" else before
        packed = layout == "packed" and geometry.packed_qkv
        queries = n_in if packed else k
        macs = queries * d * query + 2 * n_in * d * key + 2 * k * n_in * query + k * query * d + k * mlp
        macs += k * d * query if geometry.gate else 0
        macs += (n_in - k) * d * geometry.packed_mlp_dim if packed else 0
        if block in merging and layout == "split":
            macs += k * (before - k) * d * (1 + geometry.attention_norms)
        found.append(macs)
    return found
