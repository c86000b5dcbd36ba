"""What can be chosen of an export: no slimming, a plan of one's own, a tolerance, stale tokens, FP16 on a CPU, other models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tyro

from export import ExportOptions, export_bundle
from patchslim.errors import BudgetUnreachable, InputRejected
from patchslim.latency_table import load_table
from patchslim.plan import load_plan
from tests.helpers.exports import ARGUMENTS, DEPTH, TOKENS, change_plan, read, tiny
from validate import check_bundle

if TYPE_CHECKING:
    from export.pipeline import Outcome


def test_dense(export_work: Path) -> None:
    outcome = export_bundle(tiny(export_work, "dense", dense=True))
    manifest = read(outcome.bundle / "manifest.json")
    assert manifest["tokens_per_block"] == [TOKENS] * DEPTH
    assert manifest["macs"]["reduction"] == 0
    assert manifest["macs"]["dense"] == manifest["macs"]["slim"]
    assert manifest["calibration"] is None
    assert outcome.plan.origin.criterion == "dense"
    assert [rung["agreement"] for rung in manifest["rungs"]] == [100] * 4
    assert check_bundle(outcome.bundle).passed


def test_a_plan_is_used_as_it_is_and_not_searched_again(ort_export: Outcome, export_work: Path, tmp_path: Path) -> None:
    kept = [[0, 1, 5, 9], [0, 5], [0]]
    given = change_plan(ort_export.bundle / "plan.json", tmp_path / "plan.json", kept)
    before = {path.name for path in export_work.glob("plan-*")}
    outcome = export_bundle(tiny(export_work, "planned", plan=given))
    assert load_plan(outcome.bundle / "plan.json") == load_plan(given)
    assert outcome.plan.kept == kept
    assert {path.name for path in export_work.glob("plan-*")} == before
    assert check_bundle(outcome.bundle).passed


def test_a_plan_without_the_weights_that_were_fitted_to_it_is_refused(ort_export: Outcome, export_work: Path) -> None:
    alone = ort_export.bundle / "plan.json"  # in a bundle the fitted weights are in the ONNX
    with pytest.raises(InputRejected, match=r"a bundle has them in its ONNX files alone; pass a plan\.json of slimming\.run"):
        export_bundle(tiny(export_work, "refused", plan=alone))


@pytest.mark.parametrize(
    ("kept", "named"),
    [([[0, 1], [0]], "blocks 2, the model has 3"), ([[0, 1], [0, 2], [0]], "not nested"), ([[0, 10], [0], [0]], "below 10")],
)
def test_a_plan_that_does_not_fit_is_refused(
    ort_export: Outcome, export_work: Path, tmp_path: Path, kept: list[list[int]], named: str
) -> None:
    given = change_plan(ort_export.bundle / "plan.json", tmp_path / "plan.json", kept)
    with pytest.raises(InputRejected, match=named):
        export_bundle(tiny(export_work, "refused", plan=given))
    assert not (export_work.parent / "refused").exists()


def test_a_tolerance_decides_instead_of_the_budget(export_work: Path) -> None:
    outcome = export_bundle(tiny(export_work, "tolerance", tolerance=0.0, fit="none"))
    assert (outcome.plan.origin.criterion, outcome.plan.origin.value) == ("tolerance", 0.0)
    assert outcome.plan.counts == [TOKENS, TOKENS, 1]  # without any error only the last block can be cut
    slim = outcome.parity.rungs[1]
    assert (slim.agreement, slim.top1_drop) == (100, 0)
    assert slim.max_error is not None
    assert slim.max_error < 1e-5


def test_stale_tokens_are_read_by_later_blocks(export_work: Path) -> None:
    outcome = export_bundle(tiny(export_work, "stale", mode="stale", macs_reduction=0.3, fit="none"))
    assert outcome.plan.mode == read(outcome.bundle / "plan.json")["mode"] == "stale"
    assert outcome.macs.reduction >= 0.3
    assert outcome.parity.passed
    assert check_bundle(outcome.bundle).passed
    compact = outcome.plan.model_copy(update={"mode": "compact"})
    assert compact.macs() < outcome.macs.slim  # frozen tokens still cost their keys and values


def test_fp16_in_onnx_runtime(export_work: Path) -> None:
    outcome = export_bundle(tiny(export_work, "half", precision="fp16"))
    rungs = {rung.stage: rung for rung in outcome.parity.rungs}
    assert list(rungs) == ["pytorch", "pytorch-slim", "onnx-slim", "onnx-slim-fp16", "engine"]
    assert "same run as onnx-slim-fp16" in rungs["engine"].note
    assert rungs["engine"].top1 == rungs["onnx-slim-fp16"].top1
    assert outcome.parity.engine.precision == read(outcome.bundle / "manifest.json")["precision"] == "fp16"
    assert (outcome.bundle / "model.fp16.onnx").stat().st_size < 0.7 * (outcome.bundle / "model.onnx").stat().st_size
    assert check_bundle(outcome.bundle).passed


def test_a_latency_budget_is_solved_on_a_table_that_is_measured_once_and_kept(export_work: Path, tmp_path: Path) -> None:
    outcome = export_bundle(tiny(export_work, "latency", latency_reduction=0.2, batch_size=2, fit="none"))
    table = load_table(outcome.bundle / "latency_table.json")
    assert outcome.plan.origin.criterion == "latency-reduction"
    assert table.of(outcome.plan.counts) <= 0.8 * table.dense()
    assert sum(path.name.startswith("latency-") for path in export_work.iterdir()) == 1
    again = export_bundle(tiny(export_work, "latency", latency_budget_ms=0.9 * table.dense(), batch_size=2, fit="none"))
    assert table.of(again.plan.counts) <= 0.9 * table.dense()
    assert (again.bundle / "latency_table.json").read_bytes() == (outcome.bundle / "latency_table.json").read_bytes()
    assert sum(path.name.startswith("latency-") for path in export_work.iterdir()) == 1
    with pytest.raises(BudgetUnreachable, match="nearest reachable point"):
        export_bundle(tiny(export_work, "greedy", latency_budget_ms=1e-6, batch_size=2))
    given = tiny(
        export_work, "latency", latency_reduction=0.2, latency_table=outcome.bundle / "latency_table.json", mode="stale"
    )
    with pytest.raises(InputRejected, match="measured for something else: mode"):
        export_bundle(given)


def test_an_unreachable_budget(export_work: Path) -> None:
    with pytest.raises(BudgetUnreachable, match=r"no patches at all remove \d+\.\d%") as caught:
        export_bundle(tiny(export_work, "greedy", macs_reduction=0.95))
    assert caught.value.exit_code == 6
    assert not (export_work.parent / "greedy").exists()


@pytest.mark.parametrize(
    ("model", "more", "prefix", "head"),
    [
        ("deit_tiny_distilled_patch16_224", (), 2, [0, 1]),
        pytest.param("vit_tiny_patch16_224", ("reg_tokens=2",), 3, [0], marks=pytest.mark.slow),
    ],
)
def test_other_prefix_tokens(export_work: Path, model: str, more: tuple[str, ...], prefix: int, head: list[int]) -> None:
    arguments = (*ARGUMENTS, "depth=2", *more)
    outcome = export_bundle(tiny(export_work, f"prefix-{prefix}", model=model, model_arg=arguments, macs_reduction=0.3))
    assert (outcome.plan.prefix_tokens, outcome.plan.head_tokens, outcome.plan.tokens) == (prefix, head, prefix + 9)
    assert outcome.plan.kept[0][:prefix] == list(range(prefix))
    assert outcome.plan.counts[0] < outcome.plan.tokens
    assert outcome.plan.kept[-1] == head
    exported = outcome.parity.rungs[2]
    assert exported.max_error is not None
    assert exported.max_error < 1e-4
    assert check_bundle(outcome.bundle).passed


@pytest.mark.parametrize(
    ("model", "more", "pooling"),
    [
        pytest.param("vit_base_patch16_siglip_224", (), "map", marks=pytest.mark.slow),
        ("vit_small_patch16_dinov3", ("img_size=64", "dynamic_img_size=False"), "avg"),  # rotary positions, registers
    ],
)
def test_other_families(export_work: Path, model: str, more: tuple[str, ...], pooling: str) -> None:
    arguments = (*ARGUMENTS, "depth=2", *more)
    outcome = export_bundle(tiny(export_work, pooling, model=model, model_arg=arguments, macs_reduction=0.3))
    assert outcome.plan.pooling == pooling
    assert outcome.parity.macs.reduction >= 0.3
    exported = outcome.parity.rungs[2]
    assert exported.max_error is not None
    assert exported.max_error < 1e-4
    assert check_bundle(outcome.bundle).passed


def test_preprocessing_of_ones_own_reaches_the_manifest(export_work: Path) -> None:
    options = tiny(
        export_work, "grey", dense=True, mean=(0.4,), std=(0.2,), crop_pct=1.0, interpolation="bilinear", eval_images=8
    )
    outcome = export_bundle(options)
    config = read(outcome.bundle / "manifest.json")["preprocessing"]
    assert (config["mean"], config["std"]) == ([0.4] * 3, [0.2] * 3)
    assert (config["crop_pct"], config["interpolation"]) == (1.0, "bilinear")
    assert check_bundle(outcome.bundle).passed


@pytest.mark.parametrize("given", ["sm86 sm89", "sm86,sm89", "sm86 --target sm89"])
def test_targets_can_be_given_in_every_usual_way(given: str) -> None:
    parsed = tyro.cli(ExportOptions, args=["--engine", "trt", "--target", *given.split(), "--dry-run"])
    assert parsed.targets == ("sm86", "sm89")
    assert parsed.dry_run
