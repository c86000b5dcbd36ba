"""Summary tokens: real copies as the reference, the written-out loop over timm's own blocks, costs, the refit, refusals."""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models_factory import ALL_KINDS, build, head_of, images_for, pools, random_masks, without_fused_attention
from onnx_models import dense, plan_for
from timm.data import create_transform
from timm.models.eva import Eva
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slimming.api import dense_plan, find, make_plan
from slimming.budget import Budget
from slimming.compensate import RIDGE, compensate
from slimming.costs import MacsCost
from slimming.data import calibration_set
from slimming.door import EXIT_REJECTED, UsageError
from slimming.families import ModelReader, View
from slimming.features import DenseFeatures
from slimming.options import ModelOptions
from slimming.plan import SlimPlan, load_plan
from slimming.slim_vit import SlimViT

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def plan_of(model: Any, *, summary: bool = True) -> SlimPlan:
    """Block 0 drops three patches, block 1 none, block 2 some, and the last keeps what the head reads, or drops one more."""
    reader = ModelReader(model)
    prefix, patches = list(range(reader.prefix)), list(range(reader.prefix, reader.tokens))
    first = prefix + patches[:2] + patches[5:]
    third = prefix + patches[5:8]
    last = patches[5:7] if pools(model) else reader.head.tokens
    return make_plan(model, "tiny", [first, first, third, last], summary=summary)


def written_out(model: Any, images: Tensor, plan: SlimPlan) -> Tensor:
    """Logits under ``plan`` by timm's own blocks, a summary being as many real tokens as it stands for.

    The row that computes the new summary is one more token, whose key nobody sees. Copies rotate by nothing: sine 0, cosine 1.
    """
    eva, rope = isinstance(model, Eva), None
    tokens = model._pos_embed(model.patch_embed(images))
    if eva:
        tokens, rope = tokens
    tokens = model.norm_pre(tokens)
    here = {token: tokens[:, token] for token in range(tokens.shape[1])}
    summary, count = torch.zeros_like(tokens[:, 0]), 0
    for index, (block, kept) in enumerate(zip(model.blocks, plan.kept, strict=True)):
        present = list(here)
        stood_for = [here[token] for token in present if token not in kept] + [summary] * count
        rows = [here[token] for token in present] + [summary] * count
        writes = bool(stood_for) and index < plan.depth - 1
        if writes:
            rows.append(torch.stack(stood_for).mean(dim=0))
        mask = torch.zeros(len(rows), len(rows))
        if writes:
            mask[:, -1] = float("-inf")
        rotation = {}
        if eva:
            table = rope[index] if model.rope_mixed and rope is not None else rope
            if table is not None:
                table = table[..., [token - plan.prefix_tokens for token in present[plan.prefix_tokens :]], :]
                still = torch.cat([torch.zeros(table.shape[-1] // 2), torch.ones(table.shape[-1] // 2)])
                extra = len(rows) - len(present)
                table = torch.cat([table, still.expand(*table.shape[:-2], extra, -1)], dim=-2)
            rotation = {"rope": table}
        output = block(torch.stack(rows, dim=1), attn_mask=mask, **rotation)
        here = {token: output[:, place] for place, token in enumerate(present) if token in kept}
        if writes:
            summary, count = output[:, -1], len(stood_for)
    full = torch.zeros_like(tokens)
    for token, value in here.items():
        full[:, token] = value
    return head_of(model, full, plan.kept[-1])


@pytest.mark.parametrize("fused", [True, False])
def test_a_key_with_log_c_weighs_as_much_as_c_copies(fused: bool) -> None:
    """Softmax and mix with log(7) on one key, against that token seven times among the keys."""
    torch.manual_seed(0)
    model = build()
    attention = ModelReader(model).blocks[0].attentions[0][1]
    attention.module.fused_attn = fused
    tokens, queried = torch.randn(2, 5, 48), torch.randn(2, 3, 48)
    copies = torch.cat([tokens, *[tokens[:, -1:]] * 6], dim=1)
    bias = torch.tensor([1.0, 1.0, 1.0, 1.0, 7.0]).log()
    once = attention.inner(View(tokens, queried, key_bias=bias))
    torch.testing.assert_close(once, attention.inner(View(copies, queried)))
    assert not torch.allclose(once, attention.inner(View(tokens, queried)), atol=1e-3)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_plan_with_a_summary_is_the_written_out_loop(kind: str) -> None:
    model = build(kind)
    images, plan = images_for(model, 2), plan_of(model)
    answer = SlimViT(model, plan)(images)
    torch.testing.assert_close(answer, written_out(model, images, plan), **CLOSE)
    without = SlimViT(model, plan_of(model, summary=False))(images)
    assert not torch.allclose(answer, without, atol=1e-3)  # the summary does something


@pytest.mark.parametrize("kind", ["class_token", "registers", "avg_with_class", "map_with_class", "eva02_rope", "rope_mixed"])
def test_random_plans_are_the_written_out_loop(kind: str) -> None:
    model = build(kind)
    images = images_for(model, 2)
    for seed in range(6):
        plan = make_plan(model, "tiny", random_masks(model, random.Random(seed)), summary=True)
        torch.testing.assert_close(SlimViT(model, plan)(images), written_out(model, images, plan), **CLOSE)


@pytest.mark.parametrize("kind", ["class_token", "avg_with_class", "dinov3"])
def test_without_a_cut_below_the_last_block_there_is_no_summary(kind: str) -> None:
    model = build(kind)
    images, whole = images_for(model, 2), dense_plan(model, "tiny")
    last = [*whole.kept[:-1], plan_of(model).kept[-1]]
    for kept in (whole.kept, last):
        with_summary, without = (make_plan(model, "tiny", kept, summary=summary) for summary in (True, False))
        assert torch.equal(SlimViT(model, with_summary)(images), SlimViT(model, without)(images))
        assert with_summary.macs() == without.macs()
        assert with_summary.macs("packed") == without.macs("packed")


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_macs_are_the_profilers(kind: str) -> None:
    model = build(kind)
    images = images_for(model, 1)
    plans = [make_plan(model, "tiny", random_masks(model, random.Random(seed)), summary=True) for seed in (1, 2)]
    for plan in (plan_of(model), *plans):
        slim = without_fused_attention(SlimViT(model, plan))
        with FlopCounterMode(display=False) as counter:
            slim(images)
        assert 2 * plan.macs() == counter.get_total_flops()
        assert plan.macs() >= plan.model_copy(update={"summary": False}).macs()


def test_packed_macs_by_hand() -> None:
    """A block's packed projection sees what it reads; a summary that takes tokens in has a query of its own on top."""
    plan = plan_of(build())  # ten tokens; 7, 7, 4, 1 are kept
    d, mlp = 48, 2 * 48 * 192
    blocks = 0
    for queries, read, computed in ((11, 10, 8), (8, 8, 8), (9, 8, 5), (5, 5, 1)):
        blocks += queries * d * d + 2 * read * d * d + 2 * computed * read * d + computed * (d * d + mlp)
    assert plan.counts == [7, 7, 4, 1]
    assert plan.macs("packed") == plan.geometry.patch_macs + plan.geometry.head_macs + blocks


def test_stale_plans_have_no_summary(tmp_path: Path) -> None:
    plan = plan_of(build())
    with pytest.raises(ValueError, match="summary: goes with mode compact"):
        make_plan(build(), "tiny", plan.kept, mode="stale", summary=True)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["summary"] is True


def test_the_slim_module_can_be_trained_copied_and_run_in_half_precision() -> None:
    model = build("registers")
    slim = copy.deepcopy(SlimViT(model, plan_of(model))).requires_grad_(True)
    images = images_for(model, 2)
    slim(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())
    answer = slim(images).detach()
    half = slim.to(torch.bfloat16)(images.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), answer, rtol=0.1, atol=0.3)


def refitted(model: Any, images: Tensor, plan: SlimPlan) -> Any:
    fitted = copy.deepcopy(model)
    compensate(fitted, DenseFeatures(ModelReader(model), iter(images.split(8)), len(images)), plan)
    return fitted


@pytest.mark.parametrize("kind", ["class_token", "avg_with_class", "eva02_rope", "parallel_scaling"])
def test_the_refit_brings_the_kept_rows_closer(kind: str) -> None:
    """Every block's kept rows, on other images than it was fitted on; block 0 reads every token, so is exact.

    So are the answers of a fixed head; in a pooled one, what the last block's cut takes from the pool is not the fit's to mend.
    """
    model = build(kind)
    plan, other = plan_of(model), images_for(model, 48, seed=9)
    fitted = refitted(model, images_for(model, 160), plan)
    before, after = (rows_of(each, plan, other) for each in (model, fitted))
    dense_rows = rows_of(model, dense_plan(model, "tiny"), other)
    for index, kept in enumerate(plan.kept[1:], 1):
        target = dense_rows[index][:, kept]
        assert (after[index] - target).square().sum() < 0.95 * (before[index] - target).square().sum()
    if not pools(model):
        errors = [(SlimViT(each, plan)(other) - model(other)).square().sum() for each in (model, fitted)]
        assert errors[1] < 0.95 * errors[0]


def rows_of(model: Any, plan: SlimPlan, images: Tensor) -> list[Tensor]:
    """What every block of ``model`` gives under ``plan`` at the rows that it keeps."""
    found: list[Tensor] = []
    slim = SlimViT(model, plan)
    run = slim._block

    def spied(index: int, *rest: Any) -> Tensor:
        output = run(index, *rest)
        found.append(output[:, : len(plan.kept[index])])
        return output

    slim._block = spied  # type: ignore[method-assign]
    slim(images)
    return found


def test_the_fit_counts_kept_rows_only_and_sees_the_summary() -> None:
    """Block 1's W_o by least squares on what timm's own block hands to it, the summary given as three copies."""
    model = build()
    images, plan = images_for(model, 80), plan_of(model)
    fitted = refitted(model, images, plan)
    for name in ("attn.proj", "mlp.fc2"):  # block 0's kept rows are exact: a summary row that counted would move it
        torch.testing.assert_close(
            fitted.blocks[0].get_submodule(name).weight, model.blocks[0].get_submodule(name).weight, rtol=0, atol=1e-5
        )
    kept = plan.kept[0]
    tokens = model._pos_embed(model.patch_embed(images))
    mean = tokens[:, [token for token in range(10) if token not in kept]].mean(dim=1, keepdim=True)
    mask = torch.zeros(11, 11)
    mask[:, -1] = float("-inf")
    slim = model.blocks[0](torch.cat([tokens, mean], dim=1), attn_mask=mask)
    slim = torch.cat([slim[:, kept], slim[:, -1:], slim[:, -1:], slim[:, -1:]], dim=1)
    given: list[Tensor] = []
    hook = model.blocks[1].attn.proj.register_forward_hook(lambda layer, inputs, output: given.extend([inputs[0], output]))
    model.blocks[1](slim)
    block_input = model.blocks[0](tokens)
    model.blocks[1](block_input)
    hook.remove()
    inputs, mixed, _, wanted = given
    missing = (block_input + wanted)[:, kept] - (slim + mixed)[:, : len(kept)]
    x = inputs[:, : len(kept)].flatten(0, 1).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    moment = x.T @ x
    ridge = RIDGE * moment.diagonal()[:-1].mean()
    penalty = torch.cat([ridge.expand(48), 1e-6 * ridge.reshape(1)]).diag()
    change = torch.linalg.solve(moment + penalty, x.T @ missing.flatten(0, 1).double()).float()
    assert change.abs().max() > 0.01
    torch.testing.assert_close(fitted.blocks[1].attn.proj.weight, model.blocks[1].attn.proj.weight + change[:-1].T, **CLOSE)
    torch.testing.assert_close(fitted.blocks[1].attn.proj.bias, model.blocks[1].attn.proj.bias + change[-1], **CLOSE)


@pytest.mark.parametrize(("kind", "score"), [("class_token", "paper"), ("avg_with_class", "uniform"), ("dinov3", "attention")])
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_find_meets_the_budget_with_the_summary_counted(kind: str, score: Any, layout: Any) -> None:
    model = build(kind)
    found = find(
        model,
        calibration_set("digits", 12),
        name="tiny",
        transform=create_transform(tuple(int(side) for side in (3, *model.patch_embed.img_size))),
        budget=Budget("macs-reduction", 0.3),
        score=score,
        fit="closed-form",
        layout=layout,
        summary=True,
    )
    plan = found.plan
    assert plan.summary
    assert plan.macs(layout) <= 0.7 * plan.dense_macs()
    assert plan.macs(layout) > plan.model_copy(update={"summary": False}).macs(layout)
    if not pools(model):
        cost = MacsCost(plan.tokens, plan.depth, plan.geometry, layout=layout, summary=True)
        assert (cost.of(plan.counts), cost.dense()) == (plan.macs(layout), plan.dense_macs())
        raised = [plan.counts[0] + 1, *plan.counts[1:]]
        assert cost.of([min(count, plan.tokens) for count in raised]) > 0.66 * plan.dense_macs()  # and it is made use of
    images = images_for(model, 2)
    assert SlimViT(found.model, plan)(images).isfinite().all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mode": "stale"}, "stale"),
        ({"fit": "sgd"}, "sgd"),
        ({"latency_reduction": 0.3}, "latency-reduction"),
    ],
)
def test_what_does_not_go_with_a_summary_is_refused_before_the_search(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelOptions(summary=True, **more).check()
    ModelOptions(**more).check()
    ModelOptions(summary=True).check()


def test_find_refuses_what_the_options_refuse() -> None:
    model = build()
    images, transform = calibration_set("digits", 4), create_transform((3, 48, 48))
    with pytest.raises(UsageError, match="stale"):
        find(model, images, name="tiny", transform=transform, mode="stale", summary=True)


def test_the_graph_passes_refuse_it_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from graph_passes.run import main

    module, graph = dense("plain")
    plan = plan_for(module, [list(range(9)), [0, 1, 2], [0, 1], [0]]).model_copy(update={"summary": True})
    (tmp_path / "dense.onnx").write_bytes(graph.SerializeToString())
    plan.save(tmp_path / "plan.json")
    files = [str(tmp_path / name) for name in ("dense.onnx", "plan.json", "slim.onnx")]
    monkeypatch.setattr(sys, "argv", ["graph_passes.run", files[0], "--plan", files[1], "-o", files[2]])
    assert main() == EXIT_REJECTED == 3
    assert "summary tokens are not cut into ONNX graphs yet" in capsys.readouterr().err
    assert not Path(files[2]).exists()


def test_an_export_refuses_it_before_anything_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from export.run import main

    monkeypatch.setattr(sys, "argv", ["export.run", "--summary", "--output", str(tmp_path / "bundle")])
    assert main() == EXIT_REJECTED
    assert "summary tokens are not cut into ONNX graphs yet" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
