"""What each block of a plan is given of the tokens that are there: some of their rows, or constant sums of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from patchslim.choices import Mode
from patchslim.token_groups import mixing_of, sizes_of, stands_for
from slimming.models.attention import AttentionInput, TokenMix


def split(present: Sequence[int], kept: Collection[int]) -> tuple[Tensor, Tensor]:
    """Return the positions in ``present`` of the tokens in ``kept``, and of the others."""
    wanted = set(kept)
    places = [position for position, token in enumerate(present) if token in wanted]
    others = [position for position, token in enumerate(present) if token not in wanted]
    return torch.tensor(places, dtype=torch.long), torch.tensor(others, dtype=torch.long)


class Cut(nn.Module):
    """One block's cut: it reads the tokens ``present`` and computes those ``kept``.

    ``mixing`` is how the kept ones take in the dropped ones (``patchslim.token_groups.mixing_of``); None: no merging. A token
    that stands for c of the original ones is read with log(c) added to the logits of its key, so that it weighs as much as c
    copies of it would (proportional attention, after ToMe): ``sizes`` are those of the tokens present.
    """

    rows: Tensor
    dropped: Tensor
    places: Tensor

    def __init__(
        self,
        present: Sequence[int],
        kept: Sequence[int],
        sizes: Sequence[int],
        mixing: tuple[list[float], list[list[float]]] | None,
    ) -> None:
        super().__init__()
        rows, dropped = split(present, kept)
        bias = torch.tensor([math.log(size) for size in sizes]) if max(sizes) > 1 else None
        own = taken = None
        if mixing is not None:
            own, taken = torch.tensor(mixing[0])[:, None], torch.tensor(mixing[1])
        values = {"rows": rows, "dropped": dropped, "places": torch.tensor(present), "own": own, "taken": taken, "bias": bias}
        for name, value in values.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def drops(self) -> bool:
        """Whether the block computes fewer tokens than it reads."""
        return len(self.dropped) > 0

    def view(self, tokens: Tensor, rope: Tensor | None) -> AttentionInput:
        """Return what the block is given: ``tokens`` (b, n, d) are those present, ``rope`` the table of all N, if any."""
        table = rope if rope is None or len(self.places) == rope.shape[-2] else rope[..., self.places, :]
        bias = self.bias if isinstance(self.bias, Tensor) else None
        if not self.drops:
            return AttentionInput(tokens, tokens, table, table, bias)
        own, taken = self.own, self.taken
        mix = None
        if isinstance(own, Tensor) and isinstance(taken, Tensor):
            mix = TokenMix(self.rows, self.dropped, own, taken)
        queried = tokens.index_select(1, self.rows) if mix is None else mix(tokens)
        return AttentionInput(tokens, queried, table, None if table is None else table[..., self.rows, :], bias, mix=mix)


def cuts_of(kept: list[list[int]], tokens: int, mode: Mode = "compact", merged_into: list[int] | None = None) -> list[Cut]:
    """Return the cut of every block of a plan."""
    everything = list(range(tokens))
    sizes = [[1] * tokens, *sizes_of(kept, tokens, merged_into)]
    found, before = [], everything
    for block, wanted in enumerate(kept):
        mixing = None
        if merged_into is not None:
            mixing = mixing_of(before, wanted, (sizes[block], sizes[block + 1]), merged_into)
        present = everything if mode == "stale" else before
        found.append(Cut(present, wanted, [1] * tokens if mode == "stale" else sizes[block], mixing))
        before = wanted
    return found


def averages_of(kept: list[list[int]], tokens: int, merged_into: list[int] | None) -> list[Tensor]:
    """Return for every block the matrix (k, N) that gives each kept token the mean of the original tokens it stands for."""
    found = []
    for block, stands in zip(kept, stands_for(kept, tokens, merged_into), strict=True):
        row = {token: number for number, token in enumerate(block)}
        matrix = torch.zeros(len(block), tokens)
        for token, into in enumerate(stands):
            if into >= 0:
                matrix[row[into], token] = 1.0
        found.append(matrix / matrix.sum(1, keepdim=True))
    return found
