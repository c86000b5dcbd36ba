"""``SlimPlan``: which tokens each block keeps, and what that costs. Free of torch: every room and every device reads it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from patchslim.choices import Criterion, Fit, Layout, Mode, Pooling
from patchslim.macs import Geometry, macs_of
from patchslim.records import Count, StrictRecord, TokenIndex, VersionOne, load_record, save_record
from patchslim.token_groups import sizes_of, stands_for


class Calibration(StrictRecord):
    """What the plan was found on."""

    data: str
    images: Annotated[int, Field(ge=0, le=1 << 53)]
    fingerprint: str = Field(description="SHA-256 over the preprocessed calibration tensors, in order")


class WalkedPoint(StrictRecord):
    """One plan that was tried on the way to the largest reduction, as it answers on the calibration images."""

    reduction: float = Field(description="the fraction asked for")
    macs: Annotated[int, Field(ge=0, le=1 << 53)]
    top1: float | None = Field(description="percent; null without labels")
    agreement: float = Field(description="percent of the images answered as the dense model does")
    drop: float = Field(description="points of top-1 lost; without labels percent of the answers changed")
    interval: tuple[float, float] = Field(description="95 % confidence interval of the drop")
    within: bool = Field(description="whether the drop is within the margin")


class Walk(StrictRecord):
    """How the largest reduction within a margin was found: the plans that were tried, by reduction."""

    margin: float = Field(description="points that a plan may lose")
    images: Annotated[int, Field(ge=0, le=1 << 53)]
    dense_top1: float | None = Field(description="percent; null without labels, where the drop is in answers changed")
    points: list[WalkedPoint] = Field(max_length=1024)


class Origin(StrictRecord):
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
    merge_blocks: str | None = Field(
        default=None,
        description="the blocks that tokens go in, and why these; null: a ramp over all blocks was asked for",
    )
    walk: Walk | None = Field(default=None, description="how the value was found, where the largest one was asked for")
    errors: list[float] = Field(
        default=[], description="E above each block's cut before any fit but sgd, first to last; 0 where the cut is exact"
    )


#: The name of a file beside a plan: none that leads elsewhere, or that a shell or a URL reads as something else.
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"


class FittedWeights(StrictRecord):
    """The weights that go with a plan, where they are not the original's: refitted to the cut, or fine-tuned under it."""

    file: Annotated[str, Field(pattern=FILE_NAME, max_length=200)] | None = Field(
        description="safetensors file beside the plan: the model's whole state dict; null in a bundle: its ONNX files have it"
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(description="digest over names, types, shapes and values")
    fit: Fit = Field(description="what refitted the blocks")
    finetune: dict[str, float | int | str] | None = Field(default=None, description="the outcome of fine-tuning or distilling")


class SlimPlan(StrictRecord):
    """The tokens whose output each block computes, from the first block to the last.

    Token indices count prefix tokens first, then patches row by row. Masks are nested: a token that is dropped stays dropped.
    """

    schema_version: VersionOne = 1
    model: str
    tokens: Count = Field(description="N, prefix tokens included")
    grid: tuple[Count, Count] = Field(description="patch rows and columns")
    prefix_tokens: Annotated[int, Field(ge=0, le=1 << 53)]
    pooling: Pooling = Field(description="timm's global_pool; map is an attention pool")
    head_tokens: list[TokenIndex] = Field(
        description="tokens that the head reads one by one: class, and distillation where there is one; none where it pools"
    )
    mode: Mode = Field(description="what later blocks see of a dropped token: nothing (compact), or its last value (stale)")
    kept: list[list[TokenIndex]] = Field(
        min_length=1, max_length=1024, description="for every block the sorted original indices kept"
    )
    merged_into: list[Annotated[int, Field(ge=-1)]] | None = Field(
        default=None,
        description="for every token the one that it is merged into where it is dropped, -1 where there is none or it stays; "
        "compact only. A token that others were merged into is the mean of all that it stands for. None: no token is merged",
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
        """For every block, how many original tokens each kept token stands for: ones unless tokens are merged."""
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
        save_record(path, self)


def load_plan(path: Path) -> SlimPlan:
    """Read and check a ``plan.json``; raises ``InputRejected`` naming the file and the fault."""
    return load_record(path, SlimPlan, "plan")


def plan_schema() -> dict[str, object]:
    """The JSON Schema of ``plan.json``."""
    return SlimPlan.model_json_schema()
