"""Summary tokens: the mean of what a plan dropped, carried behind the kept tokens as one more.

A summary that stands for c tokens is read with log(c) added to the logits of its key, so that it weighs as much as c copies of
it would. Related: EViT's fused token, ToMe's proportional attention.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from slimming.families import View
from slimming.families.attention import identity_rope


def split(present: Sequence[int], kept: Collection[int]) -> tuple[Tensor, Tensor]:
    """Positions in ``present`` of the tokens in ``kept``, and of the others."""
    wanted = set(kept)
    places = [position for position, token in enumerate(present) if token in wanted]
    others = [position for position, token in enumerate(present) if token not in wanted]
    return torch.tensor(places, dtype=torch.long), torch.tensor(others, dtype=torch.long)


def summarised(tokens: Tensor, rows: Tensor, dropped: Tensor, count: int, rope: Tensor | None, *, last: bool) -> View:
    """What a block of a plan with a summary is given.

    ``tokens`` (b, n, d) are those that are there, and behind them the summary (b, n + 1, d) where it stands for ``count`` > 0
    of them; the block keeps ``rows`` (k,) of the n and hands the ``dropped`` (n - k,) on to the summary. ``rope`` is the rotary
    table of the n; the summary rotates by nothing. The view's queried tokens are the k kept ones and, but for the ``last``
    block, the summary: the mean of all tokens that it now stands for.
    """
    read, queried, read_rope, queried_rope, bias = tokens, tokens[:, rows], rope, rope, None
    still = None if rope is None else identity_rope(rope, 1)[..., :1, :]
    if rope is not None:
        queried_rope = rope[..., rows, :]
    if count:
        bias = functional.pad(tokens.new_full((1,), math.log(count)), (tokens.shape[1] - 1, 0))
        read_rope = _behind(rope, still)
    if not len(dropped) and not (last and count):  # the block computes what it reads
        return View(read, read, read_rope, read_rope, bias)
    if not last:
        total = tokens[:, dropped].sum(dim=1, keepdim=True)
        if count:
            total = total + count * tokens[:, -1:]
        queried = torch.cat([queried, total / (count + len(dropped))], dim=1)
        queried_rope = _behind(queried_rope, still)
    return View(read, queried, read_rope, queried_rope, bias)


def _behind(rope: Tensor | None, still: Tensor | None) -> Tensor | None:
    return None if rope is None or still is None else torch.cat([rope, still], dim=-2)
