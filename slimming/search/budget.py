"""What a user asks of a plan: a tolerance, a share of MACs or of latency to remove, milliseconds, or token counts outright."""

from __future__ import annotations

import math
from dataclasses import dataclass

from patchslim.choices import Criterion, Fit, Mode, ScoreName
from patchslim.errors import UsageError
from patchslim.macs import check_counts
from slimming.search.costs import Cost

#: The criteria that are solved on a measured latency table.
LATENCY: tuple[Criterion, ...] = ("latency-reduction", "latency-budget-ms")


@dataclass(frozen=True)
class Budget:
    """One criterion and its value; ``tokens`` (one count per block) go with the criterion ``tokens`` alone."""

    criterion: Criterion = "macs-reduction"
    value: float = 0.45
    tokens: tuple[int, ...] = ()
    snap: int = 1

    def check(self) -> None:
        """Raise ``UsageError`` for values that no search could use."""
        option = f"--{self.criterion}"
        if self.snap < 1:
            raise UsageError(f"--snap {self.snap}: must be at least 1")
        if self.criterion == "tokens" and (not self.tokens or min(self.tokens) < 1):
            raise UsageError("--tokens takes one count from 1 per block, with commas between")
        if self.criterion == "tolerance" and not 0 <= self.value < math.inf:
            raise UsageError(f"{option} {self.value}: must be a number from 0")
        if self.criterion in ("macs-reduction", "latency-reduction") and not 0 <= self.value < 1:
            raise UsageError(f"{option} {self.value}: must be a fraction from 0 to below 1")
        if self.criterion == "latency-budget-ms" and not 0 < self.value < math.inf:
            raise UsageError(f"{option} {self.value}: must be a number of milliseconds above 0")

    def limit(self, cost: Cost) -> float:
        """The most that a plan may cost."""
        return self.value if self.criterion == "latency-budget-ms" else (1 - self.value) * cost.dense()

    def counts(self, tokens: int, depth: int, prefix: int) -> list[int]:
        """The token counts asked for; raises ``UsageError`` where no plan of this model has them."""
        try:
            check_counts(self.tokens, tokens, depth)
        except ValueError as error:
            raise UsageError(f"--tokens {','.join(map(str, self.tokens))}: {error}") from error
        if any(count < prefix for count in self.tokens[:-1]):
            raise UsageError(
                f"--tokens: the {prefix} prefix tokens are kept until the last block, so every other count is at least that"
            )
        return list(self.tokens)


def check_summary(mode: Mode, fit: Fit) -> None:
    """Raise ``UsageError`` where a summary of the dropped tokens does not go with the rest of what is asked."""
    _check_merging("--summary", mode, fit)


def check_similarity(mode: Mode, fit: Fit, budget: Budget, *, summary: bool = False) -> None:
    """Raise ``UsageError`` where merging the most similar tokens does not go with the rest of what is asked."""
    if summary:
        raise UsageError("--score similarity merges every token that goes, so there is nothing left for --summary: drop one")
    if budget.criterion == "tolerance":
        raise UsageError("--tolerance is the paper's, top-down by its score: pass --score paper, or --macs-reduction")
    _check_merging("--score similarity", mode, fit)


def _check_merging(option: str, mode: Mode, fit: Fit) -> None:
    if mode == "stale":
        raise UsageError(f"{option} merges tokens that are gone, and --mode stale keeps them all readable")
    if fit == "sgd":
        raise UsageError(f"--fit sgd fits blocks that lose tokens, and {option} merges them: use closed-form")


def resolved_score(score: ScoreName, fixed_head: bool, mode: Mode, fit: Fit, budget: Budget, summary: bool) -> ScoreName:
    """What the score ``auto`` stands for; raises ``UsageError`` where another does not go with a head that pools."""
    if score == "auto":
        plain = mode == "compact" and fit != "sgd" and not summary and budget.criterion != "tolerance"
        return "similarity" if fixed_head and plain else "paper"
    if not fixed_head and (score == "similarity" or summary):
        option = "--score similarity" if score == "similarity" else "--summary"
        raise UsageError(f"{option} merges tokens for heads that read single ones, and this model's pools: pass --score paper")
    return score


def merges(score: ScoreName, fixed_head: bool, mode: Mode, fit: Fit, budget: Budget, summary: bool) -> bool:
    """Whether plans of this kind merge the tokens that they drop; raises ``UsageError`` as ``resolved_score``."""
    return resolved_score(score, fixed_head, mode, fit, budget, summary) == "similarity" or summary
