"""The accuracy tables on a tiny random model and a few digits: the numbers, what is refused, and going on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.data import create_transform

from benchmarks.accuracy.bench import Bench, CalibrationDraw, held_out
from benchmarks.accuracy.plot import correct_of, difference_error, draw, markdown
from benchmarks.accuracy.rows import EVIT_FORMS, FITS, OTHERS, SCORES, Case, TableOptions, public
from benchmarks.accuracy.tables import main, measure_tables
from patchslim.errors import InputRejected, UsageError
from patchslim.plan import load_plan
from slimming.api import FinderSettings, find_plan
from slimming.data.source import calibration_set, evaluation_set, load_tensors
from slimming.fitting.fitted_weights import load_fitted
from slimming.models.loading import load_model
from slimming.models.slim_vit import SlimViT
from slimming.models.weights import state_digest
from slimming.run import SlimmingOptions
from slimming.search.budget import Budget
from slimming.search.request import PlanRequest
from tests.helpers.commands import door_here
from tests.helpers.timm_models import TINY, build

ARGUMENTS = {**TINY, "num_classes": 10}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> TableOptions:
    folder = tmp_path_factory.mktemp("tables")
    save_file(build(num_classes=10).state_dict(), folder / "tiny.safetensors")
    return TableOptions(
        name="tiny",
        model="vit_tiny_patch16_224",
        model_arg=tuple(f"{key}={value}" for key, value in ARGUMENTS.items()),
        weights=str(folder / "tiny.safetensors"),
        eval_images=24,
        calibration_images=12,
        budgets=(0.4,),
        seeds=(0, 1),
        finetune_epochs=1,
        finetune_images=8,
        finetune_reductions=(0.5,),
        output=folder / "tiny.json",
    )


@pytest.fixture(scope="module")
def result(options: TableOptions) -> dict[str, Any]:
    return measure_tables(options)


def pick(result: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    row: dict[str, Any]
    (row,) = [row for row in result["rows"] if all(row[name] == value for name, value in wanted.items())]
    return row


def without_time(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    def timeless(value: Any) -> Any:
        return {key: timeless(each) for key, each in value.items() if key != "seconds"} if isinstance(value, dict) else value

    return {row["key"]: timeless(row) for row in result["rows"]}


def test_every_method_has_its_rows_within_the_budget(result: dict[str, Any]) -> None:
    ours = itertools.product(SCORES, FITS, (0, 1), (0.4,))
    baselines = itertools.product(["ToMe", *["EViT"] * len(EVIT_FORMS)], (False, True))
    others = {(name, seed) for name in OTHERS for seed in ((None,) if name == "resolution" else (0, 1))}
    assert {(row["method"], row["seed"]) for row in result["rows"] if row["method"] in OTHERS} == others
    assert len(result["rows"]) == 1 + len(list(ours)) + len(list(baselines)) + len(others) + 2
    for row in result["rows"]:
        if row["method"] == "resolution":
            assert row["macs"] < result["model"]["macs"]  # the side whose cost is nearest to the budget
        elif "top1" in row:
            assert row["macs"] <= (1 - row["budget"]) * result["model"]["macs"]
            assert row["reduction"] == pytest.approx(1 - row["macs"] / result["model"]["macs"], abs=1e-6)
    assert {row["form"] for row in result["rows"] if row["method"] == "EViT"} == set(EVIT_FORMS)
    assert "refused" not in pick(result, method="ToMe", head_only=True)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("fit", FITS)
def test_rows_of_ours_are_what_find_and_the_slim_model_give(
    options: TableOptions, result: dict[str, Any], score: Any, fit: Any
) -> None:
    loaded = load_model(options.model, weights=options.weights, arguments=ARGUMENTS)
    transform = create_transform(**loaded.data_config)
    calibration = calibration_set("digits", options.calibration_images, 1)
    budget = Budget("macs-reduction", 0.4)
    found = find_plan(
        loaded.module,
        calibration,
        PlanRequest(budget, score, fit, merge_blocks="ramp" if score == "similarity" else None),
        name=loaded.architecture,
        transform=transform,
        settings=FinderSettings(seed=1),
    )
    slim, hits, same, divergences = SlimViT(found.model, found.plan).eval(), [], [], []
    with torch.inference_mode():
        for images, labels in load_tensors(evaluation_set("digits", options.eval_images), transform):
            logits, dense = slim(images), loaded.module(images)
            hits += (logits.argmax(1) == labels).tolist()
            same += (logits.argmax(1) == dense.argmax(1)).tolist()
            logs = (logits.log_softmax(1), dense.log_softmax(1))
            divergences += torch.nn.functional.kl_div(*logs, log_target=True, reduction="none").sum(1).tolist()
    row = pick(result, method=score, fit=fit, seed=1, finetune=None)
    assert row["counts"] == found.plan.counts
    assert row["macs"] == found.plan.macs()
    assert row["top1"] == pytest.approx(sum(hits) / 24)
    assert row["agreement"] == pytest.approx(sum(same) / 24)
    assert correct_of(row, 24).tolist() == hits
    assert row["kl"] == pytest.approx(sum(divergences) / 24, rel=1e-3, abs=2e-6)


@pytest.mark.parametrize(
    ("method", "said", "finetuned"),
    [
        ("", ["--merge-blocks", "ramp"], False),
        ("", ["--merge-blocks", "ramp"], True),
        ("blocks-auto", [], False),
    ],
    ids=["ramp", "ramp, fine-tuned", "default"],
)
def test_rows_are_what_the_command_line_gives(
    options: TableOptions, result: dict[str, Any], tmp_path: Path, method: str, said: list[str], finetuned: bool
) -> None:
    """With the same images, seed and budget, and with nothing said of score, fit or mode."""
    case = dataclasses.replace(options.default_case(), seed=1, finetune=options.finetune_record() if finetuned else None)
    bench = Bench(options)
    found = CalibrationDraw(bench, case.mode or "compact", 1).found(
        dataclasses.replace(case, method=method or bench.options.default_score)
    )
    command = [sys.executable, "-m", "slimming.run", "--model", options.model, "--weights", options.weights]
    command += [word for argument in options.model_arg for word in ("--model-arg", argument)]
    command += ["--calibration-images", "12", "--macs-reduction", "0.4", "--seed", "1", "--device", "cpu", *said]
    if finetuned:
        command += ["--finetune-epochs", "1", "--train-images", "8"]
    done = door_here([*command, "--output", str(tmp_path / "plan.json")])
    assert done.returncode == 0, done.stderr
    plan = load_plan(tmp_path / "plan.json")
    assert plan.weights is not None
    assert found.plan == plan.model_copy(update={"weights": None})
    assert state_digest(found.model.state_dict()) == plan.weights.sha256
    assert found.fit == plan.weights.fit
    if said and not finetuned:
        row = pick(result, method=plan.origin.score, fit=plan.weights.fit, mode=plan.mode, seed=1, budget=0.4, finetune=None)
        assert row["counts"] == plan.counts
        default = {"score": plan.origin.score, "fit": plan.weights.fit, "mode": plan.mode}
        assert result["default"] == default
        slim = SlimViT(load_fitted(plan, tmp_path / "plan.json", bench.model), plan).eval()
        assert bench.accuracy_of(slim, "slim")["correct"] == row["correct"]


def test_the_defaults_of_the_tables_are_those_of_the_command_line() -> None:
    options, command = TableOptions(), SlimmingOptions()
    case = dataclasses.replace(options.default_case(), method="blocks-auto")
    given = dataclasses.replace(options.slimming(case), macs_reduction=command.macs_reduction)
    assert given == dataclasses.replace(command, device=options.device)
    assert command.budget.value in options.budgets


def test_dense_differs_from_itself_in_nothing_and_gains_and_losses_add_up(result: dict[str, Any]) -> None:
    dense = pick(result, method="dense")
    assert (dense["gained"], dense["lost"], dense["agreement"], dense["kl"]) == (0, 0, 1.0, 0.0)
    assert any(row["agreement"] < 1 for row in result["rows"])
    for row in result["rows"]:
        assert (row["gained"] - row["lost"]) / 24 == pytest.approx(row["top1"] - dense["top1"])
        assert row["kl"] >= 0


def test_the_baselines_are_measured_at_the_counts_that_are_told(options: TableOptions, result: dict[str, Any]) -> None:
    from benchmarks.accuracy.baselines import ToMeViT

    loaded = load_model(options.model, weights=options.weights, arguments=ARGUMENTS)
    row = pick(result, method="ToMe", head_only=False)
    read = [loaded.module.patch_embed.num_patches + 1, *row["counts"]]
    baseline = ToMeViT(loaded.module, [before - after for before, after in itertools.pairwise(read)])
    assert baseline.macs() == row["macs"]
    transform = create_transform(**loaded.data_config)
    with torch.inference_mode():
        hits = sum(
            int((baseline(images).argmax(1) == labels).sum())
            for images, labels in load_tensors(evaluation_set("digits", options.eval_images), transform)
        )
    assert row["top1"] == pytest.approx(hits / 24)


def test_fine_tuning_starts_from_our_default_and_changes_it(result: dict[str, Any], options: TableOptions) -> None:
    rows = [row for row in result["rows"] if row["finetune"]]
    assert [(row["method"], row["fit"], row["seed"], row["budget"]) for row in rows] == [
        ("similarity", "closed-form", 0, 0.4),
        ("similarity", "closed-form", 0, 0.5),
    ]
    before = pick(result, method="similarity", fit="closed-form", seed=0, finetune=None)
    assert rows[0]["counts"] == before["counts"]
    assert rows[0]["kl"] != before["kl"]
    assert rows[0]["finetuned"]["steps"] == 1
    assert not options.output.with_suffix(".finetune.part").exists()


def test_a_second_call_measures_only_what_is_missing_and_gives_the_same(
    options: TableOptions, result: dict[str, Any], tmp_path: Path
) -> None:
    stored = json.loads(options.output.read_text())
    dropped = [
        pick(stored, method="random", fit="closed-form", seed=1)["key"],
        pick(stored, method="EViT", form="averaged", head_only=True)["key"],
    ]
    stored["rows"] = [row | {"seconds": -1} for row in stored["rows"] if row["key"] not in dropped]
    again = dataclasses.replace(options, output=tmp_path / "again.json")
    again.output.write_text(json.dumps(stored))
    resumed = measure_tables(again)
    assert {row["key"] for row in resumed["rows"] if row["seconds"] != -1} == set(dropped)
    assert without_time(resumed) == without_time(result)
    assert json.loads(again.output.read_text())["rows"] == resumed["rows"]


def test_the_summary_is_over_seeds_and_takes_evits_best_form(result: dict[str, Any]) -> None:
    summary = {(e["method"], e["fit"], e["head_only"], e["budget"], e["finetune"] is None): e for e in result["summary"]}
    ours = summary["similarity", "closed-form", None, 0.4, True]
    tops = [pick(result, method="similarity", fit="closed-form", seed=seed, finetune=None)["top1"] for seed in (0, 1)]
    assert ours["default"]
    assert ours["seeds"] == [0, 1]
    assert (ours["top1"]["min"], ours["top1"]["max"]) == pytest.approx((min(tops), max(tops)), abs=1e-6)
    assert ours["difference"]["mean"] == pytest.approx(100 * (sum(tops) / 2 - result["model"]["top1"]), abs=1e-4)
    assert sum(entry["default"] for entry in result["summary"]) == 1
    forms = [row for row in result["rows"] if row["method"] == "EViT" and row["head_only"]]
    best = summary["EViT", None, True, 0.4, True]
    assert best["top1"]["mean"] == pytest.approx(max(row["top1"] for row in forms), abs=1e-6)


def test_comparisons_count_images_one_by_one(result: dict[str, Any]) -> None:
    entry = next(e for e in result["comparisons"] if (e["method"], e["head_only"], e["seed"]) == ("ToMe", True, 1))
    ours = correct_of(pick(result, method="similarity", fit="closed-form", seed=1), 24).tolist()
    theirs = correct_of(pick(result, method="ToMe", head_only=True), 24).tolist()
    pairs = list(zip(ours, theirs, strict=True))
    assert (entry["only_ours"], entry["only_theirs"]) == (pairs.count((True, False)), pairs.count((False, True)))
    assert entry["difference"] == pytest.approx(100 * (sum(ours) - sum(theirs)) / 24, abs=1e-4)


def test_noise_is_told_as_statistics_define_it() -> None:
    rng = random.Random(0)
    steps = [rng.choice((1, 0, 0, -1, 0)) for _ in range(200)]
    mean = sum(steps) / 200
    variance = sum((step - mean) ** 2 for step in steps) / 200
    assert difference_error(steps.count(1), steps.count(-1), 200) == pytest.approx(100 * math.sqrt(variance / 200))


def test_show_prints_tables_and_draws(
    options: TableOptions, result: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(TableOptions(show=(options.output,), figure=tmp_path / "tiny.svg")) == 0
    shown = capsys.readouterr().out
    assert shown == markdown(result) + "\n"
    row = next(line for line in shown.splitlines() if line.startswith("| **ours: similarity, closed-form** |"))
    ours = next(entry for entry in result["summary"] if entry["default"])
    assert f"{100 * ours['top1']['mean']:.2f} (" in row
    assert "| MACs removed | 40.0% | 50.0% |" in shown
    assert "<svg" in (tmp_path / "tiny.svg").read_text()
    draw(result, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "tiny.svg").read_bytes()
    draw(result, tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_written_names_no_place_of_this_machine(options: TableOptions, result: dict[str, Any]) -> None:
    text = options.output.read_text()
    assert str(options.output.parent) not in text
    assert "--weights tiny.safetensors" in result["command"]
    assert "--budgets 0.4 --seeds 0 1" in result["command"]
    assert public("../elsewhere/images.tar") == "images.tar"
    assert public(str(Path.cwd() / "a/b.tar")) == "a/b.tar"
    assert public("hfds/name") == "hfds/name"


def test_results_of_another_model_are_not_mixed_in(options: TableOptions, result: dict[str, Any]) -> None:
    before = options.output.read_bytes()
    with pytest.raises(InputRejected, match=r"another model .*weights_sha256"):
        measure_tables(dataclasses.replace(options, weights="random"))
    with pytest.raises(InputRejected, match=r"another evaluation .*images"):
        measure_tables(dataclasses.replace(options, eval_images=20))
    assert options.output.read_bytes() == before


def folder_of(images: Any, folder: Path) -> Path:
    for index in images.indices:
        picture, target = images.samples[index]
        path = folder / images.labels[target] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return folder


def test_held_out_images_are_kept_out_of_calibration_and_training(options: TableOptions, tmp_path: Path) -> None:
    fresh = dataclasses.replace(options, output=tmp_path / "refused.json", seeds=(0,))
    copied = folder_of(evaluation_set("digits", 24), tmp_path / "copy")
    same_pixels = dataclasses.replace(fresh, calibration_data=str(copied), calibration_images=30)
    with pytest.raises(InputRejected, match="among the held-out images"):
        measure_tables(same_pixels)
    trained = dataclasses.replace(fresh, train_data=str(copied), finetune_images=30)
    bench = Bench(trained)
    with pytest.raises(InputRejected, match="among the held-out images"):
        CalibrationDraw(bench, "compact", 0).slim(Case("paper", 0.4, "none", "compact", 0, finetune={"epochs": 1}))
    nested = dataclasses.replace(fresh, data=str(copied), calibration_data=str(copied / "0"))
    with pytest.raises(InputRejected, match="one is within the other"):
        measure_tables(nested)


def test_data_that_has_no_splits_is_divided_only_where_it_must_be(options: TableOptions, tmp_path: Path) -> None:
    copied = str(folder_of(evaluation_set("digits", 40), tmp_path / "copy"))
    same = held_out(dataclasses.replace(options, data=copied, eval_images=None))
    assert len(same) == 32
    assert not set(same.indices) & set(calibration_set(copied, 100).indices)
    apart = dataclasses.replace(options, data=copied, calibration_data="digits", eval_images=None)
    assert held_out(apart).indices == list(range(40))
    some = held_out(dataclasses.replace(apart, eval_images=10)).indices
    assert len(set(some)) == 10
    assert max(some) >= 36


@pytest.mark.parametrize(
    "wrong",
    [{"budgets": ()}, {"budgets": (1.0,)}, {"seeds": (-1,)}, {"default_fit": "sgd"}, {"finetune_epochs": -1}, {"threads": 0}],
)
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        measure_tables(TableOptions(**wrong))
