"""What a slimmed model computes is what the dense model computes with dropped tokens masked out (compact) or frozen (stale)."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_factory import KINDS, build, head_of, images_for, masked_blocks, random_masks, random_plan

from slimming.api import dense_plan, make_plan
from slimming.door import InputRejected
from slimming.slim_vit import SlimViT
from slimming.vit import classify, embed, run_block

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


@functools.cache
def model_of(kind: str) -> Any:
    return build(kind)


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_kept_row_is_the_masked_dense_models_row(kind: str, mode: str, seed: int) -> None:
    model = model_of(kind)
    images = images_for(model, 2, seed)
    masks = random_masks(model, random.Random(seed))
    outputs = masked_blocks(model, images, masks, mode)
    tokens, present = embed(model, images), list(range(outputs[0].shape[1]))
    for block, kept, wanted in zip(model.blocks, masks, outputs, strict=True):
        rows = run_block(block, tokens, torch.tensor([present.index(token) for token in kept]))
        torch.testing.assert_close(rows, wanted[:, kept], **CLOSE)
        tokens, present = (rows, kept) if mode == "compact" else (wanted, present)


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_slim_vits_logits_are_the_masked_dense_models(kind: str, mode: Any, seed: int) -> None:
    model = model_of(kind)
    images = images_for(model, 2, seed)
    plan = random_plan(model, seed, mode)
    wanted = head_of(model, masked_blocks(model, images, plan.kept, mode)[-1])
    torch.testing.assert_close(SlimViT(model, plan)(images), wanted, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_plan_and_the_exact_last_cut_change_nothing(kind: str) -> None:
    model = model_of(kind)
    images = images_for(model, 3)
    plan = dense_plan(model, "tiny")
    assert plan.is_dense
    last_cut = make_plan(model, "tiny", [*plan.kept[:-1], plan.head_tokens])
    assert not last_cut.is_dense
    wanted = model(images)
    torch.testing.assert_close(SlimViT(model, plan)(images), wanted, **CLOSE)
    torch.testing.assert_close(SlimViT(model, last_cut)(images), wanted, **CLOSE)


def test_a_real_cut_changes_the_answer_so_that_the_tests_above_can_fail() -> None:
    model = model_of("class_token")
    images = images_for(model, 3)
    masks = [[0, 1, 2], [0, 1], [0], [0]]
    compact, stale = (masked_blocks(model, images, masks, mode)[-1][:, 0] for mode in ("compact", "stale"))
    dense = masked_blocks(model, images, [list(range(10))] * 4, "compact")[-1][:, 0]
    assert (compact - dense).abs().max() > 1e-2
    assert (compact - stale).abs().max() > 1e-2


def test_fused_and_plain_attention_agree() -> None:
    fused, plain = build("qk_norm"), build("qk_norm")
    for block in plain.blocks:
        block.attn.fused_attn = False
    assert fused.blocks[0].attn.fused_attn
    images, plan = images_for(fused, 2), random_plan(fused, 5)
    torch.testing.assert_close(SlimViT(fused, plan)(images), SlimViT(plain, plan)(images), **CLOSE)


def test_classify_takes_the_heads_tokens_alone() -> None:
    model = model_of("distilled")
    tokens = torch.randn(2, 11, 48)
    torch.testing.assert_close(classify(model, tokens[:, :2]), head_of(model, tokens), **CLOSE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"depth": 3}, "blocks 4, the model has 3"),
        ({"img_size": 64}, "tokens 10, the model has 17"),
        ({"embed_dim": 24}, "token width 48, the model has 24"),
        ({"reg_tokens": 2}, "tokens 10, the model has 12"),
        ({"img_size": (16, 144)}, r"patch grid \(3, 3\), the model has \(1, 9\)"),
        ({"mlp_ratio": 2}, "MLP width 192, the model has 96"),
        ({"num_classes": 5}, "head's MACs 336, the model has 240"),
    ],
)
def test_a_plan_for_another_model_is_refused(change: dict[str, Any], named: str) -> None:
    plan = random_plan(model_of("class_token"), 3)
    with pytest.raises(InputRejected, match=named):
        SlimViT(build(**change), plan)
