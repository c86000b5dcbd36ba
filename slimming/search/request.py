"""What is asked of a plan: budget, score, fit and form, and whether they go together. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from patchslim.choices import FitChoice, Layout, Mode, ScoreName
from patchslim.errors import UsageError
from slimming.models.abilities import Ability, Refusals, check_abilities
from slimming.search.budget import LATENCY, Budget
from slimming.search.distillation import Distillation
from slimming.search.few_blocks import MergeBlocks

_NO_REFUSALS: Mapping[Ability, str] = {}


@dataclass(frozen=True)
class PlanRequest:
    """A plan that is asked for.

    ``score`` chooses the tokens that go, ``fit`` is how blocks are refitted (``distillation`` says how long by ``distill``,
    and ``auto`` takes that or ``closed-form``, as ``slimming.search.distillation.chosen_fit`` says),
    ``mode`` what later blocks see of dropped tokens, and ``layout`` how the cut projections will be laid, for the MAC count.
    With ``summary`` the mean of what a score drops is kept as one more token, which the budget and the fit count and which
    scores and errors do not.
    """

    budget: Budget = Budget()  # noqa: RUF009 - frozen
    score: ScoreName = "auto"
    fit: FitChoice = "none"
    mode: Mode = "compact"
    layout: Layout = "split"
    summary: bool = False
    distillation: Distillation = Distillation()  # noqa: RUF009 - frozen
    merge_blocks: MergeBlocks | None = None  # where tokens go; None: as is fast in the layout
    also: tuple[Layout, ...] = ()  # other layouts in which a budget of MACs is to be kept

    def check(self) -> None:
        """Raise ``UsageError`` for values that no search could use, and for those that contradict each other on any model."""
        self.budget.check()
        self.distillation.check()
        if self.merge_blocks is not None:
            self._check_merge_blocks()
        if self.summary:
            self._check_merging("--summary")
        if self.score == "similarity":
            if self.summary:
                raise UsageError(
                    "--score similarity merges every token that goes, so there is nothing left for --summary: leave one out"
                )
            if self.budget.criterion == "tolerance":
                raise UsageError("--tolerance is the paper's, top-down by its score: pass --score paper, or --macs-reduction")
            self._check_merging("--score similarity")

    def _check_merge_blocks(self) -> None:
        given = {"tokens": "--tokens", "tolerance": "--tolerance"}.get(self.budget.criterion)
        if given is not None:
            raise UsageError(f"--merge-blocks and {given} both say how many tokens each block keeps: leave one of them out")
        if self.score == "uniform":
            raise UsageError("--score uniform has one count for all blocks, so --merge-blocks has nothing to say: leave it out")

    def _check_merging(self, option: str) -> None:
        if self.mode == "stale":
            raise UsageError(f"{option} merges tokens that are gone, and --mode stale keeps them all readable")
        if self.fit == "sgd":
            raise UsageError(f"--fit sgd fits blocks that drop tokens, and {option} merges them: use closed-form")

    @property
    def asks(self) -> list[Ability]:
        """What a model must allow; not ``closed-form``, which is left out where a model has no such fit."""
        asked: dict[Ability, bool] = {
            "sgd": self.fit == "sgd",
            "distill": self.fit == "distill",
            "summary": self.summary,
            "latency": self.budget.criterion in LATENCY,
            "similarity": self.score == "similarity",
        }
        return [ability for ability, wanted in asked.items() if wanted]

    def for_model(self, *, fixed_head: bool, refusals: Refusals = _NO_REFUSALS) -> PlanRequest:
        """Return the request as it is meant for one model: a score in place of ``auto``, no closed-form fit where it lacks one.

        ``fixed_head``: its head reads single tokens. Raises ``UsageError`` for what does not go with the model, or together.
        """
        check_abilities(self.asks, refusals)
        score = self.score
        if score == "auto":
            merging = self.mode == "compact" and self.fit != "sgd" and not self.summary and self.budget.criterion != "tolerance"
            score = "similarity" if fixed_head and merging and "similarity" not in refusals else "paper"
        elif not fixed_head and score == "similarity":
            raise UsageError(_needs_fixed_head("--score similarity"))
        if not fixed_head and self.summary:
            raise UsageError(_needs_fixed_head("--summary"))
        found = replace(self, score=score, fit="none" if self.fit == "closed-form" and "closed-form" in refusals else self.fit)
        found.check()
        return found

    @property
    def where(self) -> MergeBlocks:
        """``merge_blocks``, or few blocks where merging in all of them would be slower; ask it of a request ``for_model``.

        In packed layout a merge is fused like a cut, and every block that is cut has fewer kernels than one that is not.
        """
        if self.merge_blocks is not None:
            return self.merge_blocks
        return "auto" if self.merges and self.layout == "split" else "ramp"

    @property
    def merges(self) -> bool:
        """Whether such a plan merges the tokens that it drops; ask it of a request ``for_model``."""
        return self.score == "similarity" or self.summary

    @property
    def needs_magnitudes(self) -> bool:
        """Whether the search needs Eq. 6's second factor; ask it of a request ``for_model``."""
        return self.score in ("paper", "uniform")


def _needs_fixed_head(option: str) -> str:
    return f"{option} merges tokens for heads that read single ones, and this model's pools: pass --score paper"
