"""What a user asks of a plan: a tolerance, a share of MACs or of latency to remove, milliseconds, or token counts outright."""

from __future__ import annotations

import math
from dataclasses import dataclass

from patchslim.choices import Criterion
from patchslim.errors import UsageError
from patchslim.macs import check_counts
from slimming.search.costs import Cost

#: The criteria that are solved on a measured latency table.
LATENCY: tuple[Criterion, ...] = ("latency-reduction", "latency-budget-ms")


@dataclass(frozen=True)
class Budget:
    """One criterion and its value; ``tokens`` (one count per block) go with the criterion ``tokens`` alone.

    With ``within`` the value is not given but found: the largest one whose plan loses at most so many points of top-1.
    """

    criterion: Criterion = "macs-reduction"
    value: float = 0.45
    tokens: tuple[int, ...] = ()
    snap: int = 1
    within: float | None = None

    def check(self) -> None:
        """Raise ``UsageError`` for values that no search could use."""
        option = f"--{self.criterion}"
        if self.within is not None and not 0 <= self.within <= 100:
            raise UsageError(f"--max-top1-drop {self.within}: must be from 0 to 100 points")
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
        """Return the most that a plan may cost, in the unit of ``cost``."""
        return self.value if self.criterion == "latency-budget-ms" else (1 - self.value) * cost.dense()

    def counts(self, tokens: int, depth: int, prefix: int) -> list[int]:
        """Return the token counts asked for. Raises ``UsageError`` where no plan of this model has them."""
        try:
            check_counts(self.tokens, tokens, depth)
        except ValueError as error:
            raise UsageError(f"--tokens {','.join(map(str, self.tokens))}: {error}") from error
        if any(count < prefix for count in self.tokens[:-1]):
            raise UsageError(
                f"--tokens: the {prefix} prefix tokens are kept until the last block, so every other count is at least that"
            )
        return list(self.tokens)
