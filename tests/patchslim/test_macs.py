"""The analytic MAC count against the profiler's and against the published profile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from patchslim.macs import Geometry, macs_of
from slimming.api import dense_plan, make_plan
from slimming.models.reader import reader_of
from slimming.models.slim_vit import SlimViT
from tests.helpers.timm_models import ALL_KINDS, build, images_for, random_plan, without_fused_attention

DEIT_S = Geometry(embed_dim=384, mlp_hidden_dim=1536, patch_macs=196 * 768 * 384, head_macs=384 * 1000)
PROFILE = [197, 197, 160, 153, 121, 101, 83, 63, 50, 25, 20, 1]


def profiled(module: Any, images: torch.Tensor) -> int:
    """MACs of one image by PyTorch's counter, which sees nothing of fused attention on a CPU."""
    without_fused_attention(module)
    with FlopCounterMode(display=False) as counter:
        module(images)
    flops, count = counter.get_total_flops(), len(images)
    assert flops % (2 * count) == 0
    return flops // (2 * count)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_dense_macs_are_the_profilers(kind: str) -> None:
    model = build(kind)
    plan = dense_plan(model, "tiny")
    counted = profiled(model, images_for(model, 2))
    reader = reader_of(model)
    assert plan.macs() == plan.dense_macs() == macs_of([reader.tokens] * 4, reader.tokens, reader.geometry()) == counted


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_plans_macs_are_the_profilers(kind: str, mode: Any) -> None:
    model = build(kind)
    images = images_for(model, 1)
    for seed in (1, 2, 3):
        plan = random_plan(model, seed, mode)
        assert plan.macs("split") == profiled(SlimViT(model, plan), images)


def test_a_pool_is_charged_for_the_tokens_that_it_reads() -> None:
    model = build("map_with_class")  # class token, register, patches; the pool reads patches only
    everything = list(range(11))
    with_prefix, without = (
        make_plan(model, "tiny", [everything, everything, everything, kept]) for kept in ([0, 1, 4], [4, 5, 6])
    )
    per_token = with_prefix.geometry.pool_macs
    assert per_token == 2 * 48 * 48 + 2 * 48
    assert without.macs() - with_prefix.macs() == 2 * per_token
    for plan in (with_prefix, without):
        assert plan.macs() == profiled(SlimViT(model, plan), images_for(model, 1))


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


def test_grouped_keys_a_gate_and_a_wide_mlp_by_hand() -> None:
    d, q, k, mlp = 48, 64, 16, 1000
    geometry = Geometry(
        embed_dim=d,
        mlp_hidden_dim=99,
        patch_macs=5,
        head_macs=7,
        attn_dim=q,
        key_dim=k,
        mlp_macs=mlp,
        gate=True,
        pool_macs=11,
        pool_tokens=9,
    )
    blocks = 10 * d * q + 2 * 10 * d * k + 2 * 10 * 10 * q + 10 * q * d + 10 * d * q + 10 * mlp
    last = 4 * d * q + 2 * 10 * d * k + 2 * 4 * 10 * q + 4 * q * d + 4 * d * q + 4 * mlp
    assert macs_of([10, 4], 10, geometry) == 5 + 7 + 4 * 11 + blocks + last
    assert macs_of([10, 4], 10, geometry, layout="packed") == 5 + 7 + 4 * 11 + blocks + last + 6 * d * q
    assert macs_of([10], 10, geometry) == 5 + 7 + 9 * 11 + blocks
