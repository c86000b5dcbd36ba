"""Accuracy at equal latency: exported baselines answer like their references; what is written and read off the lines."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.accuracy import latency_exports, tables
from benchmarks.accuracy.baselines import Baseline, EViT, ToMeViT
from benchmarks.accuracy.baselines_onnx import lean
from benchmarks.accuracy.bench import Bench
from benchmarks.accuracy.latency import EqualLatencyOptions, cases, main, measure_at_equal_latency
from benchmarks.accuracy.latency_exports import RowExporter
from benchmarks.accuracy.latency_report import at_latency, draw, lines_of, markdown, summarised
from benchmarks.accuracy.rows import Case
from patchslim.errors import InputRejected, UsageError
from tests.helpers.timm_models import TINY, build, images_for

SMALL = {**TINY, "depth": 2, "num_classes": 10, "patch_size": 8}


def baselines(model: Any) -> dict[str, Baseline]:
    half = int(model.patch_embed.num_patches) // 2
    return {
        "ToMe": ToMeViT(model, 3),
        "ToMe, then none, then all": ToMeViT(model, [5, 0, half, half, 2], head_only=True),
        "ToMe, to the end": ToMeViT(model, half),
        "EViT": EViT(model, 0.5, blocks=[1, 3]),
        "EViT, averaged": EViT(model, 0.4, blocks=[1, 2, 5], normalised=True, head_only=True),
        "EViT, dropped": EViT(model, 0.3, blocks=[2], fuse=False),
        "EViT, all kept": EViT(model, 1.0),
    }


@pytest.mark.parametrize("kind", ["class_token", "qk_norm", "not_square"])
@pytest.mark.parametrize("name", baselines(build(depth=5)))
def test_the_rewritten_baseline_is_the_baseline(kind: str, name: str) -> None:
    model = build(kind, depth=5, patch_size=8).double()  # so that rounding does not decide between near-equal edges
    baseline = baselines(model)[name]
    rewritten, images = lean(baseline), images_for(model, 3).double()
    assert type(rewritten) is not type(baseline)
    assert (rewritten.counts, rewritten.macs()) == (baseline.counts, baseline.macs())
    torch.testing.assert_close(rewritten(images), baseline(images), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> EqualLatencyOptions:
    folder = tmp_path_factory.mktemp("latency")
    save_file(build(**SMALL).state_dict(), folder / "tiny.safetensors")
    return EqualLatencyOptions(
        name="tiny",
        model="vit_tiny_patch16_224",
        model_arg=tuple(f"{key}={value}" for key, value in SMALL.items()),
        weights=str(folder / "tiny.safetensors"),
        eval_images=12,
        calibration_images=8,
        budgets=(0.4,),
        baseline_budgets=(0.4,),
        head_only=(True,),  # one line of each baseline: an export takes a second or two
        batch=5,
        rounds=2,
        work=folder / "work",
        output=folder / "tiny.json",
    )


@pytest.fixture(scope="module")
def result(options: EqualLatencyOptions) -> dict[str, Any]:
    assert measure_at_equal_latency(dataclasses.replace(options, prepare=True)) is None
    assert not options.output.exists()
    measured = measure_at_equal_latency(options)
    assert measured is not None
    return measured


@pytest.mark.slow
def test_every_model_is_exported_as_it_answers_and_timed(options: EqualLatencyOptions, result: dict[str, Any]) -> None:
    assert [row["method"] for row in result["rows"]] == ["dense", "dense", "blocks-auto", "ToMe", "EViT"]
    for row in result["rows"]:
        assert set(row["exports"]) == ({"plain", "lean"} if row["method"] in ("ToMe", "EViT") else {"plain"})
        for export in row["exports"].values():
            assert export["error"] <= 1e-4
            assert export["apart"] == 0
            assert export["latency_p25"] <= export["latency_ms"] <= export["latency_p75"]
        assert row["latency_ms"] == min(export["latency_ms"] for export in row["exports"].values()) > 0
        assert row["reduction"] == pytest.approx(1 - row["macs"] / result["model"]["macs"], abs=1e-6)
        assert row["images"] == 12
        assert row["method"] == "dense" or row["reduction"] >= 0.4
    dense = result["rows"][0]
    assert (dense["ratio_to_dense"], dense["top1"], dense["agreement"]) == (1, result["model"]["top1"], 1)
    assert result["rows"][1]["agreement"] == 1  # the last block cut to the class token is exact
    assert result["rows"][1]["macs"] < dense["macs"]


@pytest.mark.slow
def test_the_graphs_hold_what_their_rows_say(options: EqualLatencyOptions, result: dict[str, Any]) -> None:
    assert options.work is not None
    kept = {path.stem: {node.op_type for node in onnx.load(path).graph.node} for path in options.work.glob("*.onnx")}
    assert len(kept) == 7
    plain = [kinds for stem, kinds in kept.items() if stem.endswith("plain") and f"{stem[:-5]}lean" in kept]
    lean_ = [kinds for stem, kinds in kept.items() if stem.endswith("lean")]
    assert all("TopK" in kinds for kinds in plain + lean_)
    assert [("ScatterElements" in kinds) for kinds in plain].count(True) == 1
    assert not any("ScatterElements" in kinds for kinds in lean_)
    for path in options.work.glob("*.onnx"):
        tensor = onnx.load(path).graph.input[0].type.tensor_type
        assert [axis.dim_value for axis in tensor.shape.dim] == [5, 3, 48, 48]


@pytest.mark.slow
def test_a_second_call_times_what_is_there(options: EqualLatencyOptions, result: dict[str, Any]) -> None:
    assert options.work is not None
    before = {path: path.stat().st_mtime_ns for path in options.work.iterdir()}
    again = measure_at_equal_latency(dataclasses.replace(options, output=options.output.with_name("again.json")))
    assert again is not None
    assert {path: path.stat().st_mtime_ns for path in options.work.iterdir()} == before
    for name in ("method", "top1", "macs", "agreement"):
        assert [row[name] for row in again["rows"]] == [row[name] for row in result["rows"]]


@pytest.mark.slow
def test_the_summary_compares_ours_with_each_line(result: dict[str, Any]) -> None:
    assert [entry["rival"] for entry in result["summary"]] == ["ToMe, last block cut", "EViT, best form, last block cut"]
    for entry in result["summary"]:
        theirs = at_latency(lines_of(result["rows"])[entry["rival"]], entry["latency_ms"])
        assert entry["reached"] == (theirs is not None)
        if theirs is not None:
            assert entry["lead"] == pytest.approx(100 * (entry["top1"] - theirs), abs=1e-3)


@pytest.mark.slow
def test_baselines_that_the_tables_hold_are_not_evaluated_again(
    options: EqualLatencyOptions, result: dict[str, Any], tmp_path: Path
) -> None:
    assert options.work is not None
    shutil.copytree(options.work, tmp_path / "work")
    bench, case = Bench(options.of_tables()), Case("ToMe", 0.4, head_only=True)
    described = bench.described()
    key, counts = tables.key_of(case, described), bench.baseline(case)[1]["counts"]
    (tmp_path / "work" / f"{key}-{options.batch}.json").unlink()
    for told, wanted in ((counts, 0.123), ([9, *counts[1:]], result["rows"][3]["top1"])):  # not what another schedule got
        row = {"key": key, "top1": 0.123, "agreement": 0.5, "counts": told}
        (tmp_path / "tables.json").write_text(json.dumps({**described, "rows": [row]}))
        known = tables.found_rows(tmp_path / "tables.json", described)
        exporter = RowExporter(bench, tmp_path / "work", batch=options.batch, known=known)
        assert exporter.row(case)["top1"] == wanted
        (tmp_path / "work" / f"{key}-{options.batch}.json").unlink()


def point(method: str, latency_ms: float, top1: float, **more: Any) -> dict[str, Any]:
    fields = {
        "method": method,
        "latency_ms": latency_ms,
        "top1": top1,
        "head_only": None,
        "fit": None,
        "budget": 0.5,
        "seed": None,
    }
    return fields | {"reduction": 0.5, "ratio_to_dense": latency_ms / 10} | more


def test_a_baselines_line_is_read_at_our_latency_in_its_favour() -> None:
    line = [point("ToMe", 4, 0.6), point("ToMe", 5, 0.5), point("ToMe", 6, 0.8), point("dense", 10, 0.9)]
    assert at_latency(line, 3.9) is None
    assert at_latency(line, 4) == pytest.approx(0.6)
    assert at_latency(line, 5) == pytest.approx(0.7)  # not its own point there, which is worse than a faster one
    assert at_latency(line, 8) == pytest.approx(0.85)
    assert at_latency(line, 12) == pytest.approx(0.9)


def test_leads_are_in_points_and_baselines_that_do_not_reach_us_have_none() -> None:
    rows = [
        point("dense", 10, 0.9),
        point("dense", 9.5, 0.9, head_only=True),
        point("paper", 5, 0.88, fit="closed-form", seed=0),
        point("ToMe", 7, 0.8, head_only=False),
        point("EViT", 4, 0.7, head_only=True, form="summed"),
    ]
    tome, evit = summarised(rows)
    assert (tome["rival"], tome["reached"], tome["lead"], tome["rival_fastest_ms"]) == ("ToMe", False, None, 7)
    assert (evit["reached"], evit["rival_top1"]) == (True, pytest.approx(0.7 + 0.2 / 5.5, abs=1e-6))
    assert evit["lead"] == pytest.approx(100 * (0.88 - 0.7 - 0.2 / 5.5), abs=1e-3)


@pytest.mark.slow
def test_show_prints_the_results_and_the_figure_is_the_same_each_time(
    options: EqualLatencyOptions, result: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    capsys.readouterr()
    assert main(EqualLatencyOptions(show=(options.output,), figure=tmp_path / "tiny.svg")) == 0
    shown = capsys.readouterr().out
    assert shown == markdown(result) + "\n" == markdown(json.loads(options.output.read_text())) + "\n"
    assert "| **ours: blocks-auto, closed-form** |" in shown
    assert shown.count("last block cut |") == 5
    draw(result, tmp_path / "again.svg")
    assert (tmp_path / "tiny.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    assert str(options.output.parent) not in options.output.read_text()


def test_other_files_and_impossible_options_are_refused(options: EqualLatencyOptions, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(InputRejected, match="not a results file"):
        main(EqualLatencyOptions(show=(tmp_path / "other.json",)))
    for wrong in (
        {"prepare": True},
        {"budgets": (1.0,)},
        {"rounds": 0},
        {"fit": "sgd"},
        {"plans": ("DiffRate",)},
        {"plans": ()},
    ):
        with pytest.raises(UsageError):
            EqualLatencyOptions(**wrong).check()  # type: ignore[arg-type]


def test_the_default_plan_is_timed_and_others_that_are_asked_for() -> None:
    assert len(cases(EqualLatencyOptions())) == 2 + 3 + 2 * 2 * 5
    assert [case.method for case in cases(EqualLatencyOptions()) if case.fit] == ["blocks-auto"] * 3
    asked = EqualLatencyOptions(plans=("ramp", "blocks-3"), score="similarity", budgets=(0.4,))
    assert [(case.method, case.budget) for case in cases(asked) if case.fit] == [("similarity", 0.4), ("blocks-3", 0.4)]


@pytest.mark.slow
def test_a_distilled_model_has_the_times_of_the_plan_of_its_counts(
    options: EqualLatencyOptions, result: dict[str, Any], tmp_path: Path
) -> None:
    plan = result["rows"][2]
    row = {"row": "distilled 40%", "budget": 0.4, "distilled": {"steps": 7}, "agreement": 0.5}
    row |= {"top1": 0.75, "counts": plan["counts"], "macs": plan["macs"], "reduction": plan["reduction"]}
    other = row | {"row": "distilled 60%", "budget": 0.6, "counts": [2] * len(plan["counts"])}
    described = {name: result[name] for name in ("model", "evaluation")} | {"calibration": {"images": 999}}
    path = tmp_path / "alternatives.json"
    path.write_text(json.dumps({**described, "rows": [{"row": "dense"}, row, other]}))
    again = measure_at_equal_latency(dataclasses.replace(options, distilled=path, output=tmp_path / "again.json"))
    assert again is not None
    *rows, found, refused = again["rows"]
    assert [each["method"] for each in rows] == [each["method"] for each in result["rows"]]
    assert (found["method"], found["top1"], found["fit"]) == ("distilled, 7 steps", 0.75, "distill")
    assert found["latency_ms"] == rows[2]["latency_ms"]
    assert refused["refused"] == "distilled, 7 steps, 60%: no plan of its counts is timed"
    assert [entry["method"] for entry in again["summary"]] == ["blocks-auto"] * 2 + ["distilled, 7 steps"] * 2
    told = markdown(again)
    assert "| **ours: distilled, 7 steps** |" in told
    assert f"Not measured: {refused['refused']}." in told
    described["model"] = described["model"] | {"weights_sha256": "0"}
    path.write_text(json.dumps({**described, "rows": [row]}))
    with pytest.raises(InputRejected, match="results of another model"):
        measure_at_equal_latency(dataclasses.replace(options, distilled=path, output=tmp_path / "third.json"))
    assert not (tmp_path / "third.json").exists()


@pytest.mark.slow
def test_an_export_that_answers_otherwise_is_not_timed(
    options: EqualLatencyOptions, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_exports, "TOLERANCE", 0.0)
    exporter = RowExporter(Bench(options.of_tables()), tmp_path, batch=options.batch, known={})
    with pytest.raises(RuntimeError, match="differs from PyTorch"):
        exporter.row(Case("dense"))
    assert not list(tmp_path.glob("*.json"))
