"""The baselines of the accuracy tables against their papers' formulae, written out edge by edge and token by token."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy.baselines import (
    EViT,
    ToMeViT,
    attend,
    bipartite_soft_matching,
    evit_for_macs,
    feed,
    merge,
    tome_for_macs,
)
from patchslim.errors import BudgetUnreachable, InputRejected, UsageError
from slimming.api import dense_plan, make_plan
from slimming.models.slim_vit import SlimViT
from tests.helpers.timm_models import build, images_for

pytestmark = pytest.mark.numeric

KINDS = ["class_token", "layer_scale", "qk_norm", "not_square"]
SIZED: dict[str, Any] = {"patch_size": 8, "depth": 5}  # 36 patches, or 32


def unfused(kind: str = "class_token", **more: Any) -> Any:
    """In float64, so that rounding neither decides between near-equal edges nor asks for a loose tolerance."""
    model = build(kind, **(SIZED | more)).double()
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def pictures(model: Any, count: int) -> Tensor:
    return images_for(model, count).double()


def profiled(module: torch.nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(images)
    return int(counter.get_total_flops()) // (2 * len(images))


def slow_tome(keys: list[Tensor], tokens: list[Tensor], sizes: list[int], r: int) -> tuple[list[Tensor], list[int]]:
    """One image's merge by the paper's five steps, on lists of vectors; ``keys`` are averaged over heads."""
    if r == 0:
        return tokens, sizes  # and in the same order: a block without merging does not sort A before B
    a, b = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
    edges = []
    for i in a[1:]:  # the class token draws no edge
        cosines = [float(keys[i] @ keys[j] / (keys[i].norm() * keys[j].norm())) for j in b]
        best = max(range(len(b)), key=lambda place: cosines[place])
        edges.append((cosines[best], i, b[best]))
    groups = {j: [j] for j in b}
    gone = set()
    for _, i, j in sorted(edges, reverse=True)[:r]:
        groups[j].append(i)
        gone.add(i)
    merged = [[i] for i in a if i not in gone] + [groups[j] for j in b]
    total = [sum(sizes[i] for i in group) for group in merged]
    return [sum(sizes[i] * tokens[i] for i in group) / n for group, n in zip(merged, total, strict=True)], total


def slow_attention(block: Any, tokens: list[Tensor], copies: list[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """One image by timm's own attention over ``copies[i]`` copies of token i: outputs and keys of one copy, maps of all."""
    repeated = torch.stack([token for token, n in zip(tokens, copies, strict=True) for _ in range(n)])[None]
    first = [sum(copies[:i]) for i in range(len(copies))]
    out = (repeated + block.ls1(block.attn(block.norm1(repeated))))[0]
    attention, n = block.attn, repeated.shape[1]
    qkv = attention.qkv(block.norm1(repeated))[0].reshape(n, 3, attention.num_heads, attention.head_dim)
    keys = attention.k_norm(qkv[:, 1])
    logits = torch.einsum("qhc,khc->hqk", attention.q_norm(qkv[:, 0]), keys) * attention.scale
    return [out[i] for i in first], [keys[i].mean(0) for i in first], logits.softmax(-1).mean(0)


def embedded(model: Any, image: Tensor) -> list[Tensor]:
    return list(model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0])


def logits_of(model: Any, tokens: list[Tensor]) -> Tensor:
    logits: Tensor = model.forward_head(model.norm(torch.stack(tokens)[None]))[0]
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_merged_is_the_dense_model(kind: str) -> None:
    model = unfused(kind)
    images = pictures(model, 3)
    for baseline in (ToMeViT(model, 0), EViT(model, 1.0), EViT(model, 0.5, blocks=[])):
        assert torch.equal(baseline(images), model(images))
        assert baseline.macs() == dense_plan(model, "tiny").dense_macs()
        assert baseline.counts == [baseline.tokens] * 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [3, 30, [0, 4, 0, 9, 2]], ids=["constant", "capped", "by block"])
def test_tome_is_the_papers_steps_on_copies_of_tokens(kind: str, schedule: Any) -> None:
    """A token of size s must act as s copies of it, which is what log(s) on the logits is for."""
    model = unfused(kind)
    images = pictures(model, 2)
    baseline = ToMeViT(model, schedule)
    found = baseline(images)
    for image, logits in zip(images, found, strict=True):
        tokens = embedded(model, image)
        sizes = [1] * len(tokens)
        for index, block in enumerate(model.blocks):
            tokens, keys, _ = slow_attention(block, tokens, sizes)
            wanted = schedule if isinstance(schedule, int) else schedule[index]
            tokens, sizes = slow_tome(keys, tokens, sizes, min(wanted, (len(tokens) - 1) // 2))
            assert len(tokens) == baseline.counts[index]
            assert sum(sizes) == baseline.tokens
            tokens = [feed(block, token[None, None])[0, 0] for token in tokens]
        torch.testing.assert_close(logits, logits_of(model, tokens))
    assert not torch.allclose(found, model(images), atol=1e-4)


def test_proportional_attention_is_attention_over_copies() -> None:
    model = unfused("qk_norm")
    torch.manual_seed(2)
    tokens, copies = torch.randn(1, 6, 48).double(), [1, 3, 1, 7, 2, 4]
    found, maps, _ = attend(model.blocks[0], tokens, torch.tensor([copies], dtype=torch.float64))
    wanted, _, copied = slow_attention(model.blocks[0], list(tokens[0]), copies)
    torch.testing.assert_close(found[0], torch.stack(wanted))
    shared = torch.stack([columns.sum(-1) for columns in copied.split(copies, dim=-1)], dim=-1)[[0, 1, 4, 5, 12, 14]]
    torch.testing.assert_close(maps.mean(1)[0], shared)
    plain, _, _ = attend(model.blocks[0], tokens)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_matching_by_hand() -> None:
    """A: 0 (class), 2, 4, 6; B: 1, 3, 5. Tokens 2 and 4 are closest to 3, 6 to 1; the class token equals 5 and stays."""
    degrees = [200, 0, 50, 60, 75, 200, 9]
    metric = torch.tensor([[[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]]) * 5
    metric[0, 3] *= 9  # cosine: a key's length says nothing
    stays, source, target = bipartite_soft_matching(metric, 2)
    assert stays.tolist() == [[0, 2]]  # tokens 0 and 4
    assert list(zip(source[0].tolist(), target[0].tolist(), strict=True)) == [(3, 0), (1, 1)]  # 6 into 1, then 2 into 3
    tokens = torch.arange(7.0)[None, :, None]
    sizes = torch.tensor([[1.0, 1, 2, 3, 1, 1, 4]])
    merged, grown = merge(tokens, sizes, (stays, source, target))
    assert grown.tolist() == [[1, 1, 5, 5, 1]]
    torch.testing.assert_close(merged[0, :, 0], torch.tensor([0, 4, (1 * 1 + 4 * 6) / 5, (3 * 3 + 2 * 2) / 5, 5]))
    assert bipartite_soft_matching(metric, 3)[0].tolist() == [[0]]  # all but the class token


def test_tome_token_counts() -> None:
    model = unfused()  # 37 tokens
    assert ToMeViT(model, 4).counts == [33, 29, 25, 21, 17]
    assert ToMeViT(model, 100).counts == [19, 10, 6, 4, 3]
    assert ToMeViT(model, 100).merged() == [18, 9, 4, 2, 1]
    assert ToMeViT(model, 4, head_only=True).merged() == [4, 4, 4, 4, 0]
    for wrong in (-1, [1, 2], [1, 1, 1, 1, -1]):
        with pytest.raises(UsageError, match="one for each of 5 blocks"):
            ToMeViT(model, wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"fuse": False}, {"normalised": True}, {"blocks": [1, 2, 5]}], ids=str)
def test_evit_is_the_papers_formula(kind: str, options: dict[str, Any]) -> None:
    model = unfused(kind)
    images = pictures(model, 2)
    baseline = EViT(model, 0.6, **options)
    found = baseline(images)
    for image, logits in zip(images, found, strict=True):
        tokens = embedded(model, image)
        for index, block in enumerate(model.blocks):
            tokens, _, maps = slow_attention(block, tokens, [1] * len(tokens))
            if index + 1 in options.get("blocks", [2, 3, 4]):
                a = maps[0].tolist()
                ranked = sorted(range(1, len(tokens)), key=lambda i: -a[i])
                kept, others = ranked[: math.ceil(0.6 * len(ranked))], ranked[math.ceil(0.6 * len(ranked)) :]
                fused = sum(a[i] * tokens[i] for i in others)
                if options.get("normalised"):
                    fused = fused / sum(a[i] for i in others)
                tokens = [tokens[i] for i in [0, *kept]] + ([fused] if options.get("fuse", True) else [])
            assert len(tokens) == baseline.counts[index]
            tokens = [feed(block, token[None, None])[0, 0] for token in tokens]
        torch.testing.assert_close(logits, logits_of(model, tokens))
    assert not torch.allclose(found, model(images), atol=1e-4)


def test_evit_token_counts_are_the_papers() -> None:
    """DeiT's 197 tokens at keep rate 0.7: ceil(0.7 x 196) = 138, and one fused, and so on."""
    deit = unfused(img_size=112, depth=12)
    assert EViT(deit, 0.7).blocks == [4, 7, 10]
    assert EViT(deit, 0.7).counts == [197] * 3 + [1 + 138 + 1] * 3 + [1 + 98 + 1] * 3 + [1 + 70 + 1] * 3
    assert EViT(deit, 0.7, fuse=False).counts == [197] * 3 + [139] * 3 + [98] * 3 + [69] * 3
    assert EViT(unfused(depth=8), 0.7).blocks == [3, 5, 7]
    for rate in (0, 1.1):
        with pytest.raises(UsageError, match="keep_rate"):
            EViT(deit, rate)
    for blocks in ([0, 4], [13]):
        with pytest.raises(UsageError, match="within 1 to 12"):
            EViT(deit, 0.7, blocks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_only", [False, True])
def test_macs_are_the_profilers(kind: str, head_only: bool) -> None:
    model = unfused(kind)
    images = pictures(model, 2)
    for r in (1, 5, [0, 7, 2, 0, 3]):
        tome = ToMeViT(model, r, head_only=head_only)
        assert tome.macs() + tome.matching_macs() == profiled(tome, images)
        assert 0 < tome.matching_macs() < 0.02 * tome.macs()
    for rate in (0.3, 0.8):
        for fuse in (True, False):
            evit = EViT(model, rate, fuse=fuse, head_only=head_only)
            assert evit.macs() == profiled(evit, images)


def test_head_only_is_exact_and_costs_what_a_plan_does() -> None:
    model = unfused()
    images = pictures(model, 3)
    plan = make_plan(model, "tiny", [list(range(37))] * 4 + [[0]])
    for baseline in (ToMeViT(model, 0, head_only=True), EViT(model, 1.0, head_only=True)):
        assert baseline.macs() == plan.macs()
        torch.testing.assert_close(baseline(images), SlimViT(model, plan)(images))
        torch.testing.assert_close(baseline(images), model(images))
    last = [3, 3, 3, 3, 0]
    torch.testing.assert_close(ToMeViT(model, 3, head_only=True)(images), ToMeViT(model, last)(images))
    cut, whole = EViT(model, 0.5, [2, 5], head_only=True), EViT(model, 0.5, [2])
    torch.testing.assert_close(cut(images), whole(images))


@functools.cache
def costs_of_every_schedule(head_only: bool) -> tuple[list[int], list[int]]:
    """MACs of ToMe under all constant schedules and those between, and of EViT at every keep rate of three digits."""
    model = unfused(depth=6)
    schedules = [[r + 1] * j + [r] * (6 - j) for r in range(19) for j in range(6)]
    rates = [step / 1000 for step in range(1, 1001)]
    return (
        [ToMeViT(model, schedule, head_only=head_only).macs() for schedule in schedules],
        [EViT(model, rate, head_only=head_only).macs() for rate in rates],
    )


@pytest.mark.parametrize("head_only", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.97, 0.8, 0.61, 0.5])
def test_budgets_are_met_from_below_as_closely_as_the_schedule_allows(share: float, head_only: bool) -> None:
    model = unfused(depth=6)
    budget = int(share * dense_plan(model, "tiny").dense_macs())
    tome, evit = tome_for_macs(model, budget, head_only=head_only), evit_for_macs(model, budget, head_only=head_only)
    costs, evit_costs = costs_of_every_schedule(head_only)
    assert tome.macs() == max(cost for cost in costs if cost <= budget)
    assert evit.keep_rate == round(evit.keep_rate, 3)  # so few tokens need no more digits
    for cost in {*costs[:3], *costs[7::13]}:  # each schedule is found by its own cost
        assert tome_for_macs(model, cost, head_only=head_only).macs() == cost
    assert evit.macs() == max(cost for cost in evit_costs if cost <= budget)


def test_a_budget_below_the_least_is_refused_with_the_least() -> None:
    model = unfused()
    least = ToMeViT(model, 18).macs()
    assert tome_for_macs(model, least).macs() == least
    with pytest.raises(BudgetUnreachable, match=f"least here is {least}"):
        tome_for_macs(model, least - 1)
    for fuse in (True, False):
        least = EViT(model, 1e-6, fuse=fuse).macs()
        assert evit_for_macs(model, least, fuse=fuse).macs() == least
        with pytest.raises(BudgetUnreachable, match=f"least here is {least}"):
            evit_for_macs(model, least - 1, fuse=fuse)


def test_parameters_are_shared() -> None:
    model = unfused()
    for baseline in (ToMeViT(model, 2), EViT(model, 0.5)):
        assert {id(p) for p in baseline.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("kind", ["distilled", "registers"])
def test_models_with_other_prefix_tokens_are_refused(kind: str) -> None:
    for baseline in (ToMeViT, EViT):
        with pytest.raises(InputRejected, match="one class token"):
            baseline(build(kind), 1)
