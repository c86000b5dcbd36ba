"""Which original tokens a kept token stands for, where dropped tokens are merged."""

from __future__ import annotations


def sizes_of(kept: list[list[int]], tokens: int, merged_into: list[int] | None) -> list[list[int]]:
    """Return, for every block, how many of the original tokens each token that it keeps stands for."""
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
    """Return, for every block, which kept token stands for each original one: itself, the one it went into, or -1 for none."""
    found, stands, there = [], list(range(tokens)), set(range(tokens))
    for block in kept:
        dropped = there - set(block)
        stands = [(-1 if merged_into is None else merged_into[token]) if token in dropped else token for token in stands]
        found.append(stands)
        there = set(block)
    return found


def mixing_of(
    before: list[int], kept: list[int], sizes: tuple[list[int], list[int]], merged_into: list[int]
) -> tuple[list[float], list[list[float]]] | None:
    """Return the weights by which a block that reads ``before`` and keeps ``kept`` merges the others; None: it merges none.

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
