"""How many tokens each block keeps, by whatever is asked for: outright counts, one for all, a ramp, or few blocks."""

from __future__ import annotations

from slimming.search.budget import Budget
from slimming.search.costs import Cost
from slimming.search.few_blocks import Choice, FewBlocks, MergeBlocks
from slimming.search.profile import PaidBeside, ProfileEvaluator, asked_counts, snapped, uniform_within


def counts_within(
    evaluator: ProfileEvaluator,
    budget: Budget,
    cost: Cost,
    where: MergeBlocks = "ramp",
    *,
    uniform: bool = False,
) -> Choice:
    """Return token counts per block that meet ``budget``, falling ``where`` it is asked for.

    ``uniform``: one count for every block but the last. Tokens that the evaluator keeps beside its last count are paid for, and
    a budget in tokens has them in its last count; the counts that are returned do not. Raises ``BudgetUnreachable``, and
    ``UsageError`` for token counts or blocks that no plan of this model has.
    """
    if budget.criterion == "tokens":
        return Choice(snapped(evaluator, asked_counts(evaluator, budget), budget.snap))
    paid = PaidBeside(cost, evaluator.beside) if evaluator.beside else cost
    if uniform:
        return Choice(uniform_within(evaluator, paid, budget.limit(cost), budget.snap))
    return FewBlocks(evaluator, paid, budget.limit(cost), budget.snap).chosen(where)
