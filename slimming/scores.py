"""Token significance: the paper's score (Eq. 6) by an exact Gram recursion, one block at a time, from the last block down.

The score of token i at block t's output sums, over every path of heads h through the deeper blocks, how strongly the head's
tokens hang on token i, times how large the token's attention-mixed input is:

    s_{t,i} = sum_paths ||A e_i||^2 * sum_h ||U_t^h[i, :]||^2,    U_t^h = P_t^h |Z_{t-1}|

The first factor needs no enumeration of the H^(L-t) paths: it is the diagonal of G, where G starts as the rows that the head
reads and each block replaces it by ``sum_h P_h^T G P_h``. Near the top G has low rank, so a factor F with ``G = F F^T`` is
carried while it is the smaller form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slimming.plan import ScoreName


@dataclass(frozen=True)
class PathGram:
    """Gram matrix over the tokens at one block boundary of b images: a factor (b, n, r), or the matrix (b, n, n) itself."""

    value: Tensor
    is_factor: bool

    def rows(self, positions: Tensor) -> PathGram:
        """The Gram over the tokens at ``positions`` only."""
        value = self.value[:, positions]
        return PathGram(value if self.is_factor else value[:, :, positions], self.is_factor)

    @staticmethod
    def of_rows(images: int, rows: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> PathGram:
        """The start: every kept row of the last block counts once, ``G = I``."""
        identity = torch.eye(rows, dtype=dtype, device=device)
        return PathGram(identity.expand(images, rows, rows), is_factor=True)

    def through(self, attention: Tensor) -> PathGram:
        """One block further down: ``sum_h P_h^T G P_h`` for ``attention`` (b, heads, rows of this Gram, tokens it read)."""
        heads, tokens = attention.shape[1], attention.shape[3]
        if self.is_factor:
            if heads * self.value.shape[2] <= tokens:
                factors = attention.transpose(2, 3) @ self.value[:, None]
                return PathGram(factors.permute(0, 2, 1, 3).flatten(2), is_factor=True)
            half = self.value[:, None].transpose(2, 3) @ attention  # (b, heads, r, tokens)
            flat = half.flatten(1, 2)
            return PathGram(flat.transpose(1, 2) @ flat, is_factor=False)
        half = (self.value[:, None] @ attention).flatten(1, 2)
        return PathGram(attention.flatten(1, 2).transpose(1, 2) @ half, is_factor=False)

    def diagonal(self) -> Tensor:
        """``sum_paths ||A e_i||^2`` of every token: (b, n)."""
        if self.is_factor:
            return self.value.square().sum(2)
        return self.value.diagonal(dim1=1, dim2=2)


def input_magnitude(attention: Tensor, tokens: Tensor) -> Tensor:
    """``sum_h ||P_h[i, :] |Z|||^2`` (b, n) from ``attention`` (b, heads, n, n) and the block's input Z (b, n, d).

    With fewer tokens than channels the Gram matrix ``|Z| |Z|^T`` is the cheaper way to the same numbers.
    """
    size = tokens.abs()
    if tokens.shape[1] < tokens.shape[2]:
        return ((attention @ (size @ size.transpose(1, 2))[:, None]) * attention).sum(dim=(1, 3))
    return (attention @ size[:, None]).square().sum(dim=(1, 3))


def paper_score(diagonal: Tensor, magnitude: Tensor) -> Tensor:
    """Eq. 6 summed over the batch, (n,) in float64: ``sum_paths ||A e_i||^2`` times ``sum_h ||U_h[i, :]||^2``, each (b, n)."""
    return (diagonal.double() * magnitude.double()).sum(0)


@dataclass(frozen=True)
class Seen:
    """What a score may look at in one batch: the block above a cut, on dense features.

    ``maps`` (b, heads, rows above, n) are its softmax matrices over ``n`` tokens; ``above`` (rows,) are the positions of its
    queries among them; ``values`` (b, heads, n) the norms of its values; ``magnitude`` (b, n) is Eq. 6's second factor.
    """

    maps: Tensor
    above: Tensor
    values: Tensor | None = None
    magnitude: Tensor | None = None


State = PathGram | Tensor


class Score(Protocol):
    """A way to rank tokens, carried down from block to block. Its state belongs to one batch, images first."""

    needs_magnitude: bool
    needs_values: bool

    def start(self, weights: Tensor) -> State:
        """The state above the last block, from how the head's pooled feature hangs on each token that it reads (b, k, r)."""

    def score(self, state: State, seen: Seen) -> Tensor:
        """Every token's score summed over the batch: (n,) in float64."""

    def carry(self, state: State, seen: Seen) -> State:
        """The state one block further down; ``seen`` now shows the tokens that were kept, and them alone."""


class PaperScore:
    """Eq. 6 of the paper."""

    needs_magnitude, needs_values = True, False

    def start(self, weights: Tensor) -> State:
        """The Gram over the head's tokens, as its factor."""
        return PathGram(weights, is_factor=True)

    def score(self, state: State, seen: Seen) -> Tensor:
        """``sum_paths ||A e_i||^2 * sum_h ||U^h[i, :]||^2``."""
        assert isinstance(state, PathGram)
        assert seen.magnitude is not None
        return paper_score(state.through(seen.maps).diagonal().cpu(), seen.magnitude.cpu())

    def carry(self, state: State, seen: Seen) -> State:
        """The Gram below the block."""
        assert isinstance(state, PathGram)
        return state.through(seen.maps)


class ResidualScore:
    """Relevance that flows down through ``I + P``, each map weighted by its values' norms (attention rollout with values).

    After Abnar & Zuidema (2020) and Kobayashi et al. (2020), restricted to the rows that the blocks above keep.
    """

    needs_magnitude, needs_values = False, True

    def start(self, weights: Tensor) -> State:
        """Relevance of the head's tokens: (b, k)."""
        return weights.abs().sum(2)

    def _flow(self, state: State, seen: Seen) -> Tensor:
        assert isinstance(state, Tensor)
        assert seen.values is not None
        moved = torch.einsum("bk,bhkn,bhn->bn", state, seen.maps, seen.values)
        moved = moved * (state.sum(1, keepdim=True) / moved.sum(1, keepdim=True).clamp_min(1e-30))
        return moved.index_add(1, seen.above, state)

    def score(self, state: State, seen: Seen) -> Tensor:
        """Relevance, summed over the batch."""
        return self._flow(state, seen).double().sum(0).cpu()

    def carry(self, state: State, seen: Seen) -> State:
        """Relevance of the tokens kept, of unit sum."""
        flow = self._flow(state, seen)
        return flow / flow.sum(1, keepdim=True).clamp_min(1e-30)


class AttentionScore:
    """Mean attention that a token receives from the rows that the block above keeps."""

    needs_magnitude, needs_values = False, False

    def start(self, weights: Tensor) -> State:
        """Nothing is carried."""
        return weights[:, :, 0]

    def score(self, state: State, seen: Seen) -> Tensor:
        """The mean over heads and rows, summed over the batch."""
        return seen.maps.mean(dim=(1, 2)).double().sum(0).cpu()

    def carry(self, state: State, seen: Seen) -> State:
        """Nothing is carried."""
        return state


class RandomScore:
    """Chance: what any score must beat."""

    needs_magnitude, needs_values = False, False

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def ranks(self, tokens: int) -> Tensor:
        """One draw for all images: (n,)."""
        return torch.rand(tokens, generator=self.generator, dtype=torch.float64)

    def start(self, weights: Tensor) -> State:
        """Nothing is carried."""
        return weights[:, :, 0]

    def score(self, state: State, seen: Seen) -> Tensor:
        """Never asked: ``ranks`` is."""
        raise NotImplementedError

    def carry(self, state: State, seen: Seen) -> State:
        """Nothing is carried."""
        return state


def score_named(name: ScoreName, seed: int) -> Score:
    """The score of that name; ``uniform`` ranks as ``paper`` does, it is the counts that differ."""
    if name == "random":
        return RandomScore(seed)
    if name == "residual":
        return ResidualScore()
    return AttentionScore() if name == "attention" else PaperScore()
