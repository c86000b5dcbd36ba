"""Token significance: the paper's score (Eq. 6) by an exact Gram recursion, one block at a time, from the last block down.

The score of token i at block t's output sums, over every path of heads h through the deeper blocks, how strongly the head's
tokens depend on token i, times how large the token's attention-mixed input is:

    s_{t,i} = sum_paths ||A e_i||^2 * sum_h ||U_t^h[i, :]||^2,    U_t^h = P_t^h |Z_{t-1}|

The first factor needs no enumeration of the H^(L-t) paths: it is the diagonal of G, where G starts as the rows that the head
reads and each block replaces it by ``sum_h P_h^T G P_h``. Near the top G has low rank, so a factor F with ``G = F F^T`` is
carried while it is the smaller form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from patchslim.choices import ScoreName


@dataclass(frozen=True)
class PathGram:
    """Gram matrix over the tokens at one block boundary of b images: a factor (b, n, r), or the matrix (b, n, n) itself."""

    value: Tensor
    is_factor: bool

    def rows(self, positions: Tensor) -> PathGram:
        """Return the Gram over the tokens at ``positions`` only."""
        value = self.value[:, positions]
        return PathGram(value if self.is_factor else value[:, :, positions], self.is_factor)

    @staticmethod
    def of_rows(images: int, rows: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> PathGram:
        """Return the start ``G = I``: every kept row of the last block counts once."""
        identity = torch.eye(rows, dtype=dtype, device=device)
        return PathGram(identity.expand(images, rows, rows), is_factor=True)

    def through(self, attention: Tensor) -> PathGram:
        """Return ``sum_h P_h^T G P_h``, a block further down, for ``attention`` (b, heads, rows of this Gram, tokens read)."""
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
        """Return ``sum_paths ||A e_i||^2`` of every token: (b, n)."""
        if self.is_factor:
            return self.value.square().sum(2)
        return self.value.diagonal(dim1=1, dim2=2)

    def diagonal_through(self, attention: Tensor) -> Tensor:
        """Return ``through(attention).diagonal()`` (b, n) without making the matrix."""
        if self.is_factor:
            return (self.value[:, None].transpose(2, 3) @ attention).square_().flatten(1, 2).sum(1)
        return (self.value[:, None] @ attention).mul_(attention).flatten(1, 2).sum(1)


def input_magnitude(attention: Tensor, tokens: Tensor) -> Tensor:
    """Return ``sum_h ||P_h[i, :] |Z|||^2`` (b, n) from ``attention`` (b, heads, n, n) and the block's input Z (b, n, d).

    Where tokens are few and channels many, the Gram matrix ``|Z| |Z|^T`` is the cheaper way to the same numbers.
    """
    (heads, count), width, size = attention.shape[1:3], tokens.shape[2], tokens.abs()
    rows = attention.flatten(1, 2)  # one large product per image: each head's alone is slower
    if heads * width <= width + heads * count:
        each = (rows @ size).square_().sum(2)
    else:
        each = (rows @ (size @ size.transpose(1, 2))).mul_(rows).sum(2)
    return each.view(len(each), heads, count).sum(1)


def paper_score(diagonal: Tensor, magnitude: Tensor) -> Tensor:
    """Return Eq. 6 summed over the batch, (n,) in float64.

    ``diagonal`` is ``sum_paths ||A e_i||^2`` and ``magnitude`` ``sum_h ||U_h[i, :]||^2``, each (b, n).
    """
    return (diagonal.double() * magnitude.double()).sum(0)


@dataclass(frozen=True)
class Seen:
    """What a score may look at in one batch: the block above a cut, on dense features.

    ``maps`` (b, heads, rows above, n) are its softmax matrices over ``n`` tokens; ``above`` (rows,) are the positions of its
    queries among them; ``values`` (b, heads, n) the norms of its values; ``magnitude`` (b, n) is Eq. 6's second factor. In
    carrying, ``updated`` (k,) are the positions of the tokens that the block below the cut computes; None is all of them.
    """

    maps: Tensor
    above: Tensor
    values: Tensor | None = None
    magnitude: Tensor | None = None
    updated: Tensor | None = None


@dataclass(frozen=True)
class SeenByHead:
    """What a score may look at in one batch where a pooling head stands above the cut.

    ``weights`` (b, k, r) say how the pooled feature depends on the k tokens ``reads`` (k,) of all ``tokens``; ``magnitude``
    (b, k) is Eq. 6's second factor at them.
    """

    weights: Tensor
    reads: Tensor
    tokens: int
    magnitude: Tensor | None = None


State = PathGram | Tensor
#: Adds one float64 tensor per batch, over all processes.
Total = Callable[[Sequence[Tensor]], Tensor]


class Score(Protocol):
    """How significant tokens are, computed from the last block down. Its state belongs to one batch, images first."""

    needs_magnitude: bool
    needs_values: bool

    def start(self, weights: Tensor) -> State:
        """Return the state above the last block; ``weights`` (b, k, r): how the head depends on each token it reads."""

    def scores(self, block: int, tokens: int, looks: Iterator[tuple[State, Seen]], total: Total) -> Tensor:
        """Return every token's score at ``block``'s output over all images: (n,) float64. Looks are made when taken."""

    def head_scores(self, block: int, tokens: int, looks: Iterator[SeenByHead], total: Total) -> Tensor:
        """Return the same at the last block's output under a pooling head; only the tokens that it reads count."""

    def carry(self, state: State, look: Callable[[], Seen]) -> State:
        """Return the state one block further down; what ``look`` gives shows the tokens that were kept, and them alone."""


class ImageScore(ABC):
    """A score that is a sum over images."""

    needs_magnitude, needs_values = False, False

    @abstractmethod
    def score(self, state: State, seen: Seen) -> Tensor:
        """Return every token's score summed over the batch: (n,) in float64."""

    def scores(self, block: int, tokens: int, looks: Iterator[tuple[State, Seen]], total: Total) -> Tensor:
        """See ``Score.scores``."""
        return total([self.score(state, seen) for state, seen in looks])

    def head_scores(self, block: int, tokens: int, looks: Iterator[SeenByHead], total: Total) -> Tensor:
        """Return the squared weight that the pool gives a token, times Eq. 6's second factor where the score has it."""
        return total([_under_head(seen) for seen in looks])


def _under_head(seen: SeenByHead) -> Tensor:
    each = seen.weights.square().sum(2).double().cpu()
    if seen.magnitude is not None:
        each = each * seen.magnitude.double().cpu()
    return torch.zeros(seen.tokens, dtype=torch.float64).index_add(0, seen.reads.cpu(), each.sum(0))


class PaperScore(ImageScore):
    """Eq. 6 of the paper."""

    needs_magnitude, needs_values = True, False

    def start(self, weights: Tensor) -> State:
        """Return the Gram over the head's tokens, as its factor."""
        return PathGram(weights, is_factor=True)

    def score(self, state: State, seen: Seen) -> Tensor:
        """Return ``sum_paths ||A e_i||^2 * sum_h ||U^h[i, :]||^2``."""
        assert isinstance(state, PathGram)
        assert seen.magnitude is not None
        return paper_score(state.diagonal_through(seen.maps).cpu(), seen.magnitude.cpu())

    def carry(self, state: State, look: Callable[[], Seen]) -> State:
        """Return the Gram below the block; paths end at tokens that the block below does not compute."""
        assert isinstance(state, PathGram)
        seen = look()
        return state.through(seen.maps if seen.updated is None else seen.maps[..., seen.updated])


class ResidualScore(ImageScore):
    """Relevance that flows down through ``I + P``, each map weighted by its values' norms (attention rollout with values).

    After Abnar & Zuidema (2020) and Kobayashi et al. (2020), restricted to the rows that the blocks above keep.
    """

    needs_magnitude, needs_values = False, True

    def start(self, weights: Tensor) -> State:
        """Return the relevance of the head's tokens: (b, k)."""
        return weights.abs().sum(2)

    def _flow(self, state: State, seen: Seen) -> Tensor:
        assert isinstance(state, Tensor)
        assert seen.values is not None
        moved = torch.einsum("bk,bhkn,bhn->bn", state, seen.maps, seen.values)
        moved = moved * (state.sum(1, keepdim=True) / moved.sum(1, keepdim=True).clamp_min(1e-30))
        return moved.index_add(1, seen.above, state)

    def score(self, state: State, seen: Seen) -> Tensor:
        """Return the relevance, summed over the batch."""
        return self._flow(state, seen).double().sum(0).cpu()

    def carry(self, state: State, look: Callable[[], Seen]) -> State:
        """Return the relevance of the tokens read, of unit sum; only tokens that the block below computes pass theirs on."""
        seen = look()
        flow = self._flow(state, seen)
        flow = flow / flow.sum(1, keepdim=True).clamp_min(1e-30)
        return flow if seen.updated is None else flow[:, seen.updated]


class AttentionScore(ImageScore):
    """Mean attention that a token receives from the rows that the block above keeps."""

    def start(self, weights: Tensor) -> State:
        """Return any state: none is used."""
        return weights[:, :, 0]

    def score(self, state: State, seen: Seen) -> Tensor:
        """Return the mean over heads and rows, summed over the batch."""
        return seen.maps.mean(dim=(1, 2)).double().sum(0).cpu()

    def carry(self, state: State, look: Callable[[], Seen]) -> State:
        """Return any state: none is used."""
        return state


class RandomScore:
    """Chance: what any score must beat. It looks at no image; a seed and a block give the same draw whenever they are asked."""

    needs_magnitude, needs_values = False, False

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def start(self, weights: Tensor) -> State:
        """Return any state: none is used."""
        return weights[:, :, 0]

    def scores(self, block: int, tokens: int, looks: Iterator[tuple[State, Seen]], total: Total) -> Tensor:
        """Return the block's draw."""
        return self._draw(block, tokens)

    def head_scores(self, block: int, tokens: int, looks: Iterator[SeenByHead], total: Total) -> Tensor:
        """Return the block's draw."""
        return self._draw(block, tokens)

    def carry(self, state: State, look: Callable[[], Seen]) -> State:
        """Return any state: none is used."""
        return state

    def _draw(self, block: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(block + 1, tokens, generator=generator, dtype=torch.float64)[block]


def score_named(name: ScoreName, seed: int) -> Score:
    """Return the score of that name; that of ``uniform`` is ``paper``: only its counts differ."""
    if name == "random":
        return RandomScore(seed)
    if name == "residual":
        return ResidualScore()
    return AttentionScore() if name == "attention" else PaperScore()
