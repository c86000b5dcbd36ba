"""What a plan may ask of a model beside dropping tokens, and how a reader says that its model cannot. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from patchslim.errors import UsageError

#: Refits by ridge regression, gradient descent or distillation, fine-tuning, the two ways to merge tokens, budgets in
#: measured latency.
Ability = Literal["closed-form", "sgd", "distill", "finetune", "similarity", "summary", "latency"]
#: The abilities that a model lacks, each with the message for a user who asks for it.
Refusals = Mapping[Ability, str]


def check_abilities(asked: Iterable[Ability], refusals: Refusals) -> None:
    """Raise ``UsageError`` with the message of the first ability of ``asked`` that is refused."""
    for ability in asked:
        if ability in refusals:
            raise UsageError(refusals[ability])
