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

import torch
from torch import Tensor


@dataclass(frozen=True)
class PathGram:
    """Gram matrix over the tokens at one block boundary of b images: a factor (b, n, r), or the matrix (b, n, n) itself."""

    value: Tensor
    is_factor: bool

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
    """``sum_h ||P_h[i, :] |Z|||^2`` (b, n) from ``attention`` (b, heads, n, n) and the block's input Z (b, n, d)."""
    return (attention @ tokens.abs()[:, None]).square().sum(dim=(1, 3))


def paper_score(diagonal: Tensor, magnitude: Tensor) -> Tensor:
    """Eq. 6 summed over the batch, (n,) in float64: ``sum_paths ||A e_i||^2`` times ``sum_h ||U_h[i, :]||^2``, each (b, n)."""
    return (diagonal.double() * magnitude.double()).sum(0)
