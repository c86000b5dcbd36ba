"""What a slimmed model computes is what the dense model computes with dropped tokens masked out (compact) or frozen (stale)."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchslim.errors import InputRejected
from slimming.api import dense_plan, make_plan
from slimming.models.reader import reader_of
from slimming.models.slim_vit import SlimViT, check_fits
from tests.helpers.timm_models import (
    ALL_KINDS,
    build,
    head_of,
    images_for,
    masked_blocks,
    pools,
    random_masks,
    random_plan,
    without_fused_attention,
)

pytestmark = pytest.mark.numeric

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


@functools.cache
def model_of(kind: str) -> Any:
    return build(kind)


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", ALL_KINDS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_kept_row_is_the_masked_dense_models_row(kind: str, mode: str, seed: int) -> None:
    model = model_of(kind)
    images = images_for(model, 2, seed)
    masks = random_masks(model, random.Random(seed))
    outputs = masked_blocks(model, images, masks, mode)
    reader = reader_of(model)
    tokens, present = reader.embed(images), list(range(reader.tokens))
    for block, rope, kept, wanted in zip(reader.blocks, reader.ropes(), masks, outputs, strict=True):
        rows = block.run(reader.view(tokens, present, kept, rope))
        torch.testing.assert_close(rows, wanted[:, kept], **CLOSE)
        tokens, present = (rows, kept) if mode == "compact" else (wanted, present)


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", ALL_KINDS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_slim_vits_logits_are_the_masked_dense_models(kind: str, mode: Any, seed: int) -> None:
    model = model_of(kind)
    images = images_for(model, 2, seed)
    plan = random_plan(model, seed, mode)
    wanted = head_of(model, masked_blocks(model, images, plan.kept, mode)[-1], plan.kept[-1])
    torch.testing.assert_close(SlimViT(model, plan)(images), wanted, **CLOSE)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_dense_plan_and_the_exact_last_cut_change_nothing(kind: str) -> None:
    model = model_of(kind)
    images = images_for(model, 3)
    plan = dense_plan(model, "tiny")
    assert plan.is_dense
    reads = reader_of(model).head.tokens
    last_cut = make_plan(model, "tiny", [*plan.kept[:-1], reads])
    assert last_cut.is_dense == (len(reads) == plan.tokens)
    wanted = model(images)
    torch.testing.assert_close(SlimViT(model, plan)(images), wanted, **CLOSE)
    torch.testing.assert_close(SlimViT(model, last_cut)(images), wanted, **CLOSE)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_real_cut_changes_the_answer_so_that_the_tests_above_can_fail(kind: str) -> None:
    model = model_of(kind)
    images, prefix = images_for(model, 3), int(model.num_prefix_tokens)
    masks = [list(range(prefix + count)) for count in (4, 3, 2, 2)]
    compact, stale = (head_of(model, masked_blocks(model, images, masks, mode)[-1], masks[-1]) for mode in ("compact", "stale"))
    assert (compact - model(images)).abs().max() > 1e-2
    assert (compact - stale).abs().max() > 3e-3


@pytest.mark.parametrize("kind", ["qk_norm", "parallel_scaling", "parallel_things", "eva02_rope", "grouped_query", "siglip"])
def test_fused_and_plain_attention_agree(kind: str) -> None:
    fused, plain = build(kind), without_fused_attention(build(kind))
    assert any(getattr(module, "fused_attn", False) for module in fused.modules())
    images, plan = images_for(fused, 2), random_plan(fused, 5)
    torch.testing.assert_close(SlimViT(fused, plan)(images), SlimViT(plain, plan)(images), **CLOSE)


@pytest.mark.parametrize("kind", ["class_token", "distilled", "siglip", "parallel_scaling", "rope_mixed", "gated"])
def test_a_copy_reads_its_own_weights(kind: str) -> None:
    model = build(kind)
    plan = random_plan(model, 3)
    images = images_for(model, 2)
    original = SlimViT(model, plan)
    before = original(images)
    twin = copy.deepcopy(original)
    torch.testing.assert_close(twin(images), before, rtol=0, atol=0)
    for name, parameter in twin.model.named_parameters():  # one at a time, so that no layer is read from the original
        own = dict(model.named_parameters())[name]
        assert own.data_ptr() != parameter.data_ptr()
        parameter *= 1.5
    changed = twin(images)
    assert (changed - before).abs().max() > 1e-2
    torch.testing.assert_close(original(images), before, rtol=0, atol=0)
    for parameter in model.parameters():
        parameter *= 0.5
    torch.testing.assert_close(twin(images), changed, rtol=0, atol=0)
    assert (original(images) - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["class_token", "siglip", "parallel_things", "rope_mixed", "gated"])
def test_every_parameter_is_read_where_it_lies(kind: str) -> None:
    """Replacing one parameter of a copy changes the slim answer as it changes the masked dense model's."""
    slim = copy.deepcopy(SlimViT(build(kind), random_plan(build(kind), 8)))
    model, images = slim.model, images_for(build(kind), 2)
    for parameter in model.parameters():
        parameter.data = parameter * 1.3 + 0.02
        wanted = head_of(model, masked_blocks(model, images, slim.plan.kept, "compact")[-1], slim.plan.kept[-1])
        torch.testing.assert_close(slim(images), wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["distilled", "siglip", "dinov3_plus"])
def test_the_weights_keep_their_names_and_nothing_is_added(kind: str) -> None:
    model = build(kind)
    names = list(model.state_dict())
    slim = SlimViT(model, random_plan(model, 1))
    assert slim.model is model
    assert list(slim.model.state_dict()) == names
    assert list(slim.state_dict()) == [f"model.{name}" for name in names]
    assert [name for name, _ in slim.named_parameters()] == [f"model.{name}" for name, _ in model.named_parameters()]


def test_one_plan_serves_doubles_too() -> None:
    model = build("dinov3").double()
    plan = random_plan(model, 2)
    images = images_for(model, 2).double()
    wanted = head_of(model, masked_blocks(model, images, plan.kept, "stale")[-1], plan.kept[-1])
    answer = SlimViT(model, plan.model_copy(update={"mode": "stale"}))(images)
    assert answer.dtype == torch.float64
    torch.testing.assert_close(answer, wanted, rtol=1e-6, atol=1e-6)


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
        ({"patch_size": 8, "img_size": 24}, "patch embedding's MACs 331776, the model has 82944"),
        ({"class_token": False, "reg_tokens": 1, "global_pool": "avg"}, "pooling token, the model has avg"),
        ({"global_pool": "map"}, "pooling token, the model has map"),
    ],
)
def test_a_plan_for_another_model_is_refused(change: dict[str, Any], named: str) -> None:
    plan = random_plan(model_of("class_token"), 3)
    with pytest.raises(InputRejected, match=f"the plan was made for tiny with {named}") as raised:
        SlimViT(build(**change), plan)
    assert raised.value.exit_code == 3


def test_a_plan_for_other_roles_of_the_same_tokens_is_refused() -> None:
    plan = random_plan(model_of("class_token"), 3)
    with pytest.raises(InputRejected, match="prefix tokens 1, the model has 0"):
        check_fits(build(class_token=False, global_pool="avg", img_size=(32, 80)), plan.model_copy(update={"grid": (2, 5)}))
    distilled = build("distilled")
    with pytest.raises(InputRejected, match=r"head tokens \[0, 1\], the model has \[0\]"):
        check_fits(build(reg_tokens=1), dense_plan(distilled, "tiny"))
    with pytest.raises(InputRejected, match=r"geometry .*gate=False.*, the model has .*gate=True"):
        check_fits(build("gated"), dense_plan(build("class_token"), "tiny"))
    check_fits(build("avg_with_class"), dense_plan(build("avg_with_class"), "tiny"))


@pytest.mark.parametrize("kind", ["avg_with_class", "siglip", "map_with_class", "dinov3"])
def test_a_pooled_plan_must_leave_the_head_something_to_read(kind: str) -> None:
    model = model_of(kind)
    prefix, tokens = int(model.num_prefix_tokens), reader_of(model).tokens
    everything = list(range(tokens))
    assert pools(model)
    single = make_plan(model, "tiny", [everything, everything, everything, [tokens - 1]])
    wanted = head_of(model, masked_blocks(model, images_for(model, 2), single.kept, "compact")[-1], single.kept[-1])
    torch.testing.assert_close(SlimViT(model, single)(images_for(model, 2)), wanted, **CLOSE)
    if prefix:
        nothing = make_plan(model, "tiny", [everything, everything, everything, list(range(prefix))])
        with pytest.raises(InputRejected, match="keeps no token in the last block that tiny's head reads"):
            SlimViT(model, nothing)
