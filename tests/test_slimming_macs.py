"""The analytic MAC count against the profiler's and against the published profile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_factory import KINDS, build, images_for, random_plan
from torch.utils.flop_counter import FlopCounterMode

from slimming.api import dense_plan, make_plan
from slimming.plan import Geometry, macs_of
from slimming.slim_vit import SlimViT

DEIT_S = Geometry(embed_dim=384, mlp_hidden_dim=1536, patch_macs=196 * 768 * 384, head_macs=384 * 1000)
PROFILE = [197, 197, 160, 153, 121, 101, 83, 63, 50, 25, 20, 1]


def profiled(module: Any, images: torch.Tensor) -> int:
    """MACs of one image by PyTorch's counter, which sees nothing of fused attention on a CPU."""
    for block in getattr(module, "model", module).blocks:
        block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        module(images)
    flops, count = counter.get_total_flops(), len(images)
    assert flops % (2 * count) == 0
    return flops // (2 * count)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_macs_are_the_profilers(kind: str) -> None:
    model = build(kind)
    plan = dense_plan(model, "tiny")
    assert plan.macs() == plan.dense_macs() == profiled(model, images_for(model, 2))


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_plans_macs_are_the_profilers(kind: str, mode: Any, seed: int) -> None:
    model = build(kind)
    plan = random_plan(model, seed, mode)
    assert plan.macs("split") == profiled(SlimViT(model, plan), images_for(model, 2))


def test_packed_adds_the_dropped_tokens_queries() -> None:
    model = build()
    plan = make_plan(model, "tiny", [list(range(10)), [0, 1, 2, 3], [0, 1], [0]])
    assert plan.macs("packed") - plan.macs("split") == ((10 - 4) + (4 - 2) + (2 - 1)) * 48 * 48
    stale = plan.model_copy(update={"mode": "stale"})
    assert stale.macs("packed") - stale.macs("split") == ((10 - 4) + (10 - 2) + (10 - 1)) * 48 * 48


@pytest.mark.parametrize(
    ("counts", "mode", "billions"), [([197] * 12, "compact", 4.599), (PROFILE, "stale", 2.659), (PROFILE, "compact", 2.328)]
)
def test_the_published_deit_s_profile(counts: list[int], mode: Any, billions: float) -> None:
    assert macs_of(counts, 197, DEIT_S, mode) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_the_exact_last_cut_saves_what_the_method_says_of_deit() -> None:
    saved = 1 - macs_of([197] * 11 + [1], 197, DEIT_S) / macs_of([197] * 12, 197, DEIT_S)
    assert saved == pytest.approx(0.069, abs=5e-4)
