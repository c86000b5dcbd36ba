"""Evaluators of token counts with a made-up divergence, and costs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from patchslim.choices import Mode
from patchslim.macs import Geometry, check_counts
from slimming.search.costs import MacsCost

GEOMETRY = Geometry(embed_dim=48, mlp_hidden_dim=192, patch_macs=20_000, head_macs=500)


@dataclass
class Made:
    """An evaluator with a made-up divergence; ``fixed_head`` None: a head that pools the patches, or all tokens it is given."""

    tokens: int
    depth: int
    prefix: int
    fixed_head: int | None = 1
    reads_prefix: bool = False
    merit: Callable[[Sequence[int]], float] = lambda counts: float(counts[0])
    asked: list[list[int]] = field(default_factory=list)
    asked_quickly: list[list[int]] = field(default_factory=list)

    @property
    def beside(self) -> int:
        return 0

    @property
    def readable(self) -> int:
        return self.fixed_head or (self.tokens if self.reads_prefix else self.tokens - self.prefix)

    def divergence(self, counts: Sequence[int]) -> float:
        self.asked.append(list(counts))
        return self.merit(counts)

    def quick_divergence(self, counts: Sequence[int]) -> float:
        self.asked_quickly.append(list(counts))
        return self.merit(counts)

    def nested(self, counts: Sequence[int]) -> list[int]:
        """What ``by_counts`` makes of them at worst: the block below the last keeps the prefix tokens beside its tokens."""
        result = list(counts)
        if self.fixed_head is None and self.depth > 1:
            result[-2] = max(result[-2], min(self.tokens, result[-1] + self.prefix))
        for block in range(self.depth - 2, -1, -1):
            result[block] = max(result[block], result[block + 1])
        return result


@dataclass(frozen=True)
class Milliseconds:
    """A cost as a latency table may have it: monotone, in steps of eight tokens, each block at its own rate."""

    tokens: int
    rates: tuple[float, ...]
    unit: str = "ms"

    def of(self, counts: Sequence[int]) -> float:
        check_counts(counts, self.tokens, len(self.rates))
        given = [self.tokens, *counts[:-1]]
        return 1.0 + sum(rate * (2 * -(-n // 8) + -(-k // 8)) for rate, n, k in zip(self.rates, given, counts, strict=True))

    def dense(self) -> float:
        return self.of([self.tokens] * len(self.rates))


def macs(evaluator: Made, mode: Mode = "compact") -> MacsCost:
    return MacsCost(evaluator.tokens, evaluator.depth, GEOMETRY, mode)
