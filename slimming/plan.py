"""``SlimPlan``: which tokens each block keeps, and what that costs. Free of torch: every room and every device reads it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slimming.door import InputRejected, atomic_path

Layout = Literal["split", "packed"]
Mode = Literal["compact", "stale"]
Fit = Literal["none", "closed-form", "sgd"]
Criterion = Literal["tolerance", "macs-reduction", "latency-reduction", "latency-budget-ms", "tokens", "manual", "dense"]
ScoreName = Literal["auto", "similarity", "paper", "residual", "attention", "random", "uniform"]
_Count = Annotated[int, Field(ge=1, le=1_000_000)]
_Index = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Geometry(_Strict):
    """The sizes that the analytic MAC count needs, as timm names them."""

    embed_dim: _Count = Field(description="token width d")
    mlp_hidden_dim: _Count = Field(description="width d' of the MLP's hidden layer")
    patch_macs: Annotated[int, Field(ge=0)] = Field(description="MACs of the patch embedding, whole image")
    head_macs: Annotated[int, Field(ge=0)] = Field(description="MACs of the classifier head or heads, once per image")
    attn_dim: _Count | None = Field(default=None, description="width of all queries, where it is not embed_dim")
    key_dim: _Count | None = Field(default=None, description="width of all keys and of all values, where it is not attn_dim")
    mlp_macs: _Count | None = Field(default=None, description="MACs of the MLP per token, where they are not 2 d d'")
    gate: bool = Field(default=False, description="whether the attention's output is gated")
    packed_qkv: bool = Field(default=True, description="whether queries, keys and values come from one projection")
    packed_mlp_dim: Annotated[int, Field(ge=0)] = Field(
        default=0, description="width of that projection which goes to the MLP's hidden layer"
    )
    attention_norms: Annotated[int, Field(ge=0)] = Field(
        default=1, description="norms in front of a block's attentions: none where they come after, several side by side"
    )
    pool_macs: Annotated[int, Field(ge=0)] = Field(default=0, description="MACs of an attention pool per token that it reads")
    pool_tokens: Annotated[int, Field(ge=0)] = Field(default=0, description="tokens that the attention pool can read")


class Calibration(_Strict):
    """What the plan was found on."""

    data: str
    images: Annotated[int, Field(ge=0)]
    fingerprint: str = Field(description="SHA-256 over the preprocessed calibration tensors, in order")


class Origin(_Strict):
    """How the plan was found."""

    score: str = Field(
        description="token score: 'paper' is Eq. 6; 'similarity' merges the most alike; 'none' for a plan made by hand or dense"
    )
    criterion: Criterion
    value: float = Field(description="the tolerance, fraction or milliseconds asked for; 0 for tokens, manual and dense")
    tolerance: float | None = Field(default=None, description="the tolerance on E_{l+1} that the search ended at or near")
    seed: int = 0
    calibration: Calibration | None = None
    snap: Annotated[int, Field(ge=1)] = Field(default=1, description="token counts are rounded to multiples of this")
    errors: list[float] = Field(
        default=[], description="E above each block's cut before any fit but sgd, first to last; 0 where the cut is exact"
    )


class FittedWeights(_Strict):
    """The weights that go with a plan, where they are not the original's: refitted to the cut, or fine-tuned under it."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=200)] = Field(
        description="safetensors file beside the plan: a whole state dict of the model"
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(description="digest over names, types, shapes and values")
    fit: Fit = Field(description="what refitted the blocks")
    finetune: dict[str, float | int | str] | None = Field(default=None, description="the fine-tuning recipe and its outcome")


class SlimPlan(_Strict):
    """The tokens whose output each block computes, from the first block to the last.

    Token indices count prefix tokens first, then patches row by row. Masks are nested: a token that is dropped stays dropped.
    """

    schema_version: Literal[1] = 1
    model: str
    tokens: _Count = Field(description="N, prefix tokens included")
    grid: tuple[_Count, _Count] = Field(description="patch rows and columns")
    prefix_tokens: Annotated[int, Field(ge=0)]
    pooling: Literal["token", "avg", "map"] = Field(description="timm's global_pool; map is an attention pool")
    head_tokens: list[_Index] = Field(
        description="tokens that the head cannot do without: class, and distillation where there is one; none where it pools"
    )
    mode: Mode = Field(description="what later blocks see of a dropped token: nothing (compact), or its last value (stale)")
    kept: list[list[_Index]] = Field(min_length=1, description="for every block the sorted original indices kept")
    merged_into: list[Annotated[int, Field(ge=-1)]] | None = Field(
        default=None,
        description="for every token the one that takes it in where it is dropped, -1 where it is lost or stays; compact only. "
        "A token that took others in is the mean of all that it stands for. None: every dropped token is lost",
    )
    geometry: Geometry
    origin: Origin
    weights: FittedWeights | None = Field(default=None, description="None: the plan is for the original's weights")

    @model_validator(mode="after")
    def _check(self) -> SlimPlan:
        n = self.tokens
        if self.prefix_tokens + self.grid[0] * self.grid[1] != n:
            raise ValueError(f"tokens: {n} is not {self.prefix_tokens} prefix tokens + a {self.grid[0]} x {self.grid[1]} grid")
        if any(t >= self.prefix_tokens for t in self.head_tokens):
            raise ValueError("head_tokens: must name at least one prefix token and nothing else")
        if (self.pooling == "token") != bool(self.head_tokens):
            raise ValueError(f"head_tokens: {self.head_tokens} does not go with pooling {self.pooling!r}")
        for block, kept in enumerate(self.kept):
            if any(b <= a for a, b in pairwise(kept)):
                raise ValueError(f"kept[{block}]: indices must be sorted and unique")
            if not kept or kept[-1] >= n:
                raise ValueError(f"kept[{block}]: must name at least one token below {n}")
            if not set(self.head_tokens) <= set(kept):
                raise ValueError(f"kept[{block}]: lacks a token that the head reads")
            if block < len(self.kept) - 1 and kept[: self.prefix_tokens] != list(range(self.prefix_tokens)):
                raise ValueError(f"kept[{block}]: lacks a prefix token; they are kept until the last block")
            if block and not set(kept) <= set(self.kept[block - 1]):
                raise ValueError(f"kept[{block}]: not nested in kept[{block - 1}]; a dropped token cannot come back")
            prefix = kept[: self.prefix_tokens]
            whole = prefix == list(range(self.prefix_tokens))
            if self.pooling == "token" and kept[-1] >= self.prefix_tokens and not whole:
                raise ValueError(f"kept[{block}]: keeps a patch, but not every prefix token")
        if self.merged_into is not None:
            self._check_merges(self.merged_into)
        return self

    def _check_merges(self, merged_into: list[int]) -> None:
        if self.mode == "stale" or self.pooling != "token":
            raise ValueError("merged_into: goes with mode compact and a head that reads single tokens")
        if len(merged_into) != self.tokens:
            raise ValueError(f"merged_into: has {len(merged_into)} entries for {self.tokens} tokens")
        before = set(range(self.tokens))
        for block, kept in enumerate(self.kept):
            dropped, there = before - set(kept), set(kept)
            for token in sorted(dropped):
                into = merged_into[token]
                if into >= 0 and (block == self.depth - 1 or token < self.prefix_tokens):
                    raise ValueError(f"merged_into[{token}]: the last block drops for good, and prefix tokens are never merged")
                if into >= 0 and (into not in there or into < self.prefix_tokens):
                    raise ValueError(f"merged_into[{token}]: block {block} drops it, and does not keep patch {into}")
            before = there
        if stray := [token for token in sorted(before) if merged_into[token] >= 0]:
            raise ValueError(f"merged_into[{stray[0]}]: the token is never dropped")

    @property
    def depth(self) -> int:
        """Number of blocks L."""
        return len(self.kept)

    @property
    def counts(self) -> list[int]:
        """Tokens that each block's output has, first to last."""
        return [len(kept) for kept in self.kept]

    @property
    def is_dense(self) -> bool:
        """Whether no block drops anything."""
        return all(count == self.tokens for count in self.counts)

    @property
    def merging(self) -> list[int]:
        """The blocks that merge any of the tokens that they drop."""
        into = self.merged_into or [-1] * self.tokens
        before = [range(self.tokens), *self.kept]
        return [block for block, kept in enumerate(self.kept) if any(into[token] >= 0 for token in {*before[block]} - {*kept})]

    def macs(self, layout: Layout = "split") -> int:
        """Multiply-accumulates of one image under the plan; see ``macs_of``."""
        readable = self.tokens - self.geometry.pool_tokens  # prefix tokens lead, and are what a pool may not read
        reads = sum(token >= readable for token in self.kept[-1])
        return macs_of(self.counts, self.tokens, self.geometry, self.mode, layout, reads, self.merging)

    def dense_macs(self) -> int:
        """Multiply-accumulates of one image through the unslimmed model."""
        return macs_of([self.tokens] * self.depth, self.tokens, self.geometry)

    def sizes(self) -> list[list[int]]:
        """For every block, how many of the original tokens each that it keeps stands for: ones unless tokens are merged."""
        return sizes_of(self.kept, self.tokens, self.merged_into)

    def stands_for(self) -> list[list[int]]:
        """For every block, which kept token stands for each original one: itself, the one it went into, or -1 for none."""
        return stands_for(self.kept, self.tokens, self.merged_into)

    def order(self) -> list[int]:
        """Original indices: prefix tokens, then patches by the block that drops them, longest kept first, ties by index.

        Under this order every cut takes one run of rows: block l keeps the first ``counts[l]`` tokens, but where a head that
        pools needs no prefix token any more. Those that the last block drops there are the first of all.
        """
        survived = Counter(token for kept in self.kept for token in kept)
        head = set(self.head_tokens)

        def rank(token: int) -> tuple[bool, bool, int, int]:
            prefix = token < self.prefix_tokens
            return token not in head, not prefix, survived[token] if prefix and not head else -survived[token], token

        return sorted(range(self.tokens), key=rank)

    def save(self, path: Path) -> None:
        """Write ``plan.json`` whole or not at all; raises ``OSError``."""
        text = json.dumps(self.model_dump(mode="json"), indent=1)
        with atomic_path(path) as part:
            part.write_text(text + "\n", encoding="utf-8")


def macs_of(
    counts: list[int],
    tokens: int,
    geometry: Geometry,
    mode: Mode = "compact",
    layout: Layout = "split",
    pool_reads: int | None = None,
    merging: Collection[int] = (),
) -> int:
    """Multiply-accumulates of one image whose block l outputs ``counts[l]`` of ``tokens`` tokens; biases and norms count zero.

    ``layout`` says how a cut block's projections are laid: ``split`` queries kept tokens only, ``packed`` keeps one qkv
    projection over every token that the block reads, and so also spends the dropped tokens' queries (and what of the MLP is
    projected with them). ``pool_reads`` of the last block's tokens go to an attention pool; None: as many as it can read. The
    blocks ``merging`` add what they drop to what they keep by a constant matrix, for the shortcut and for what is read at the
    queries alone: behind a packed projection, else behind each norm.
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
    """The part of ``macs_of`` that each block has."""
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
        if block in merging:
            projected = query + geometry.packed_mlp_dim + (d if geometry.gate else 0)
            macs += k * (before - k) * (d + (projected if packed else d * geometry.attention_norms))
        found.append(macs)
    return found


def sizes_of(kept: list[list[int]], tokens: int, merged_into: list[int] | None) -> list[list[int]]:
    """For every block, how many of the original tokens each that it keeps stands for."""
    size = [1] * tokens
    found, before = [], list(range(tokens))
    for block in kept:
        there = set(block)
        for token in before:
            if token not in there and merged_into is not None and merged_into[token] >= 0:
                size[merged_into[token]] += size[token]
        found.append([size[token] for token in block])
        before = block
    return found


def stands_for(kept: list[list[int]], tokens: int, merged_into: list[int] | None) -> list[list[int]]:
    """For every block, which kept token stands for each original one: itself, the one it went into, or -1 for none."""
    found, stands, there = [], list(range(tokens)), set(range(tokens))
    for block in kept:
        lost = there - set(block)
        stands = [(-1 if merged_into is None else merged_into[token]) if token in lost else token for token in stands]
        found.append(stands)
        there = set(block)
    return found


def mixing_of(
    before: list[int], kept: list[int], sizes: tuple[list[int], list[int]], merged_into: list[int]
) -> tuple[list[float], list[list[float]]] | None:
    """How a block that reads ``before`` and keeps ``kept`` takes in what it drops; None where it takes in nothing.

    ``sizes`` are those of both, as ``SlimPlan.sizes`` gives them. A kept token becomes ``own`` (k) times itself plus its row of
    ``taken`` (k, n - k) times the dropped tokens, in their order: the mean of all that it then stands for.
    """
    there = set(kept)
    row = {token: number for number, token in enumerate(kept)}
    was, now = dict(zip(before, sizes[0], strict=True)), dict(zip(kept, sizes[1], strict=True))
    dropped = [token for token in before if token not in there]
    if all(merged_into[token] < 0 for token in dropped):
        return None
    taken = [[0.0] * len(dropped) for _ in kept]
    for column, token in enumerate(dropped):
        if (into := merged_into[token]) >= 0:
            taken[row[into]][column] = was[token] / now[into]
    return [was[token] / now[token] for token in kept], taken


def load_plan(path: Path) -> SlimPlan:
    """Read and check a ``plan.json``; raises ``InputRejected`` naming the file and the fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputRejected(f"{path}: cannot be read as a plan: {error}") from error
    try:
        return SlimPlan.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "plan"
        raise InputRejected(f"{path}: not a valid plan: {where}: {first['msg']}") from error


def plan_schema() -> dict[str, object]:
    """The JSON Schema of ``plan.json``."""
    return SlimPlan.model_json_schema()
