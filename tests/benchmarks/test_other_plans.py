"""Other ways to spend the same MACs, as rows of the accuracy tables: each is what its name says."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks.accuracy.bench import Bench, CalibrationDraw, NotMeasured
from benchmarks.accuracy.other_plans import DIFFRATE, diffrate_counts
from benchmarks.accuracy.resolution import AtResolution
from benchmarks.accuracy.rows import OTHERS, Case, TableOptions
from benchmarks.accuracy.tables import measure_cases
from patchslim.errors import UsageError

MODEL = ("img_size=48", "patch_size=8", "embed_dim=48", "depth=6", "num_heads=3", "num_classes=10")


def bench_of(output: Path, *more: str) -> Bench:
    return Bench(
        TableOptions(
            name="tiny",
            model="vit_tiny_patch16_224",
            model_arg=(*MODEL, *more),
            weights="random",
            eval_images=12,
            calibration_images=8,
            budgets=(0.4,),
            output=output,
        )
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench_of(tmp_path_factory.mktemp("others") / "tables.json")


@pytest.fixture(scope="module")
def draw(bench: Bench) -> CalibrationDraw:
    return CalibrationDraw(bench, "compact", 0)


def case(method: str) -> Case:
    return Case(method, 0.4, "closed-form", "compact", 0)


@pytest.mark.parametrize("method", [name for name in OTHERS if name != "resolution"])
def test_a_plan_is_fitted_and_meets_the_budget_closely(bench: Bench, draw: CalibrationDraw, method: str) -> None:
    module, row = draw.slim(case(method))
    assert 0.4 <= 1 - row["macs"] / bench.dense_macs < 0.5
    assert row["counts"] == module.plan.counts
    given = dict(bench.model.named_parameters())
    changed = {name for name, value in module.model.named_parameters() if not torch.equal(value, given[name])}
    assert changed
    assert all("proj" in name or "fc2" in name for name in changed)


def test_merging_blocks_are_as_many_as_the_name_says(draw: CalibrationDraw) -> None:
    for number in (1, 2, 3):
        module, row = draw.slim(case(f"blocks-{number}"))
        assert len(module.plan.merging) == number
        assert len(set(row["counts"][:-1]) - {37}) == number


def test_a_radial_plan_keeps_the_patches_nearest_to_the_centre_and_merges_nothing(draw: CalibrationDraw) -> None:
    module, row = draw.slim(case("radial"))
    options = dataclasses.replace(draw.bench.options.slimming(case("auto")), merge_blocks="ramp")
    assert row["counts"] == draw.finder(options).find_plan(options.request()).plan.counts
    assert module.plan.merged_into is None
    away = {1 + 6 * y + x: abs(x - 2.5) ** 2 + abs(y - 2.5) ** 2 for x in range(6) for y in range(6)}
    for kept in module.plan.kept[:-1]:
        dropped = set(away) - set(kept)
        assert max(away[token] for token in kept if token) <= min((away[token] for token in dropped), default=99)


def test_a_lower_resolution_is_the_same_weights_on_smaller_images(bench: Bench) -> None:
    module, row = bench.on_smaller_images(Case("resolution", 0.4, head_only=False))
    assert isinstance(module, AtResolution)
    assert row["side"] == 40  # 25 patches of 36: 32 % removed, and 57 % at the next side
    images = bench.pixels[:2]
    small = functional.interpolate(images, (40, 40), mode="bicubic", antialias=True)
    with torch.inference_mode():
        assert torch.equal(module(images), module.model(small))
        assert not torch.allclose(module(images), bench.model(images))
    theirs, given = dict(module.model.named_parameters()), dict(bench.model.named_parameters())
    assert [name for name in given if not torch.equal(theirs[name], given[name])] == ["pos_embed"]


def test_a_model_that_pools_says_why_a_row_is_missing(tmp_path: Path) -> None:
    pooled = bench_of(tmp_path / "pooled.json", "global_pool=avg", "class_token=False")
    result = measure_cases(pooled, [case("DiffRate"), case("radial"), case("blocks-2")], "")
    assert [row.get("refused") for row in result["rows"]] == [
        "DiffRate: is for heads that read single tokens, and this model's pools",
        "radial: is for heads that read single tokens, and this model's pools",
        None,
    ]
    with pytest.raises(NotMeasured, match="single tokens"):
        CalibrationDraw(pooled, "compact", 0).slim(case("radial"))


@pytest.mark.parametrize("name", ["middle", "blocks-", "blocks-0", "blocks-x"])
def test_names_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="must be resolution, radial, DiffRate, blocks-auto or blocks-N"):
        TableOptions(others=(name,)).check()


def test_diffrates_counts_are_its_own_on_its_own_model_and_fit_others() -> None:
    assert diffrate_counts(197, 12, 1.0) == list(DIFFRATE)
    assert diffrate_counts(197, 12, 0.0) == [197] * 11
    small = diffrate_counts(65, 8, 1.0)
    assert len(small) == 7
    assert all(after <= before for before, after in pairwise([65, *small]))
    assert small[-1] == round(65 * DIFFRATE[-1] / 197)
    assert min(diffrate_counts(65, 8, 9.0)) == 2
