"""Plans of the plain tiny model that merge dropped tokens into kept ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

from patchslim.plan import SlimPlan
from slimming.api import make_plan
from tests.helpers.onnx_models import dense


def merges_of(kept: Sequence[Sequence[int]], tokens: int, prefix: int, rng: random.Random, lost: float = 0.0) -> list[int]:
    """For every token that a block but the last drops a random patch that it keeps; a share is lost."""
    into, before = [-1] * tokens, set(range(tokens))
    for block in kept[:-1]:
        patches = [token for token in block if token >= prefix]
        for token in sorted(before - set(block)):
            if patches and rng.random() >= lost:
                into[token] = rng.choice(patches)
        before = set(block)
    return into


KEPT = [[0, *range(1, 16, 2)], [0, *range(1, 16, 2)], [0, 5, 11], [0]]


def plan_of(kept: Sequence[Sequence[int]] = KEPT, seed: int = 0, **changes: object) -> SlimPlan:
    """A plan for the plain model."""
    kept = [list(block) for block in kept]
    plan = make_plan(dense("plain")[0], "tiny", kept, merged_into=merges_of(kept, 17, 1, random.Random(seed)))
    return SlimPlan.model_validate(plan.model_dump() | changes)
