"""Several engines in one bundle: one plan, one ladder, each engine with its own precision, files and rung."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from export import export_bundle
from export.begin import begin
from export.engine_times import engine_times
from export.engines.base import parse_engines
from export.pipeline import GateFailed
from export.report.page import REPORT
from export.run import run
from export.serving.facts import serving_facts
from export.several import joined
from export.summary import as_json, print_summary
from patchslim.errors import InputRejected, Unavailable
from patchslim.latency_table import load_table
from tests.helpers.bundles import reseal
from tests.helpers.exports import digests, read, stages_in, tiny
from validate import check_bundle, load_manifest, open_runner
from validate.attestation import attest, check_attestation
from validate.bundle_differences import compare_bundles
from validate.bundle_runner import fastest_first
from validate.engine_runs import EngineChoice
from validate.manifest import Manifest
from validate.options import ValidateOptions
from validate.run import run as validate_run

pytest.importorskip("openvino")

if TYPE_CHECKING:
    from export.pipeline import Outcome
    from export.precision import Attempt

RUNGS = ["pytorch", "pytorch-slim", "onnx-slim", "engine", "engine-openvino"]
EVERY = EngineChoice(None)


@pytest.fixture(scope="module")
def outcome(export_work: Path) -> Outcome:
    return export_bundle(tiny(export_work, "several", engine="ort,openvino", precision="fp32"))


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let it look as if packages were not installed."""
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in names else there(name))
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def changed(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a bundle whose records say something else, sealed anew."""
    copy = Path(shutil.copytree(bundle, folder))
    for name in ("parity.json", "manifest.json"):
        record = read(copy / name)
        change(record)
        (copy / name).write_text(json.dumps(record))
    (copy / "recipe.json").unlink()  # which reseal would make anew, of a model of its own
    reseal(copy)
    return copy


def test_one_ladder_has_the_rungs_of_both(outcome: Outcome) -> None:
    manifest, parity = (read(outcome.bundle / name) for name in ("manifest.json", "parity.json"))
    assert [rung["stage"] for rung in manifest["rungs"]] == RUNGS
    assert [rung["compared_to"] for rung in manifest["rungs"][3:]] == ["onnx-slim", "onnx-slim"]
    assert {rung["status"] for rung in manifest["rungs"]} == {"passed"}
    assert manifest["engines"] == parity["engines"]
    first, second = manifest["engines"]
    assert [one["name"] for one in (first, second)] == ["ort", "openvino"]
    assert [one["stage"] for one in (first, second)] == RUNGS[3:]
    assert first["engine"] == manifest["engine"]
    assert first["macs"] == second["macs"] == manifest["macs"]
    assert [one["engine"]["backend"] for one in (first, second)] == ["onnxruntime", "openvino"]
    assert [one["engine"]["precision"] for one in (first, second)] == ["fp32", "fp32"]
    assert second["engine"]["files"] == ["engine/model.xml", "engine/model.bin"]
    assert [(one["ms"], one["batch"]) for one in (first, second)] == [(None, None)] * 2  # by --no-measure-latency
    assert (manifest["target"]["engine"], manifest["precision"]) == ("ort", "fp32")
    assert [record["path"] for record in manifest["onnx"]] == ["model.onnx"]  # both are built from it


def test_a_bundle_of_one_engine_says_nothing_of_several(ort_export: Outcome) -> None:
    assert "engines" not in read(ort_export.bundle / "manifest.json")
    assert "engines" not in read(ort_export.bundle / "parity.json")
    assert "engines" not in as_json(ort_export)
    assert list(load_manifest(ort_export.bundle).engines_by_stage) == ["engine"]


def test_engines_for_a_cpu_are_timed_in_turn_and_once(outcome: Outcome, export_work: Path) -> None:
    work = begin(tiny(export_work, "several", engine="ort,openvino")).work
    engines = {one.request.engine: one.timed for one in outcome.attempts}
    times = engine_times(engines, work, "engines")
    assert list(times) == ["ort", "openvino"]
    assert all(ms > 0 for ms in times.values())
    assert engine_times(engines, work, "engines") == times
    stated = joined(outcome.attempts, outcome.plan, times).engines
    assert [(one.ms, one.batch) for one in stated] == [(times["ort"], 8), (times["openvino"], 8)]


def test_what_is_printed_names_both(outcome: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    timed = joined(outcome.attempts, outcome.plan, {"ort": 1.0, "openvino": 2.0})
    outcome = dataclasses.replace(outcome, parity=timed)
    printed = as_json(outcome)["engines"]
    assert [(one["name"], one["built"]) for one in printed] == [("ort", "executed"), ("openvino", "executed")]
    print_summary(outcome)
    shown = capsys.readouterr().out
    assert "engine-openvino" in shown
    assert shown.count("ms a batch of 8") == 2
    page = (outcome.bundle / REPORT).read_text(encoding="utf-8")
    assert "The engines" in page
    assert page.count("engine-openvino") >= 2
    facts = serving_facts(load_manifest(outcome.bundle))
    assert (facts.runnable, facts.onnx, facts.ir) == ("model.onnx", "model.onnx", "engine/model.xml")


def test_every_engine_is_checked_where_it_works(outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = check_bundle(outcome.bundle, engines=EVERY)
    assert verdict.exit_code == 0, verdict.faults
    assert [(one.engine, one.file) for one in verdict.engines] == [
        ("ort", "model.onnx"),
        ("openvino", "model.onnx"),
        ("openvino", "engine/model.xml"),
    ]
    attestation = tmp_path / "attestation.json"
    attestation.write_text(attest(verdict, [], None).model_dump_json(exclude={"error"}))
    known = check_bundle(outcome.bundle, engines=EngineChoice(()))
    assert [check.status for check in check_attestation(attestation, outcome.bundle, known)] == ["passed"] * 2
    without(monkeypatch, "openvino")
    verdict = check_bundle(outcome.bundle, engines=EVERY)
    idle = next(check for check in verdict.checks if check.name == "golden parity, openvino")
    assert (verdict.exit_code, idle.status, idle.subject) == (0, "not executed", "engine/model.xml, engine/model.bin")
    with pytest.raises(Unavailable, match="--engine openvino: openvino is not installed"):
        check_bundle(outcome.bundle, engines=EngineChoice(("openvino",)))


def test_each_is_measured_on_images_of_the_device(outcome: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = load_manifest(outcome.bundle)
    with np.load(outcome.bundle / "golden.npz", allow_pickle=False) as golden:
        for image in manifest.golden_images:
            folder = tmp_path / "images" / manifest.labels[int(golden["labels"][image.row])]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(outcome.bundle / image.path, folder)
    options = ValidateOptions(outcome.bundle, images=tmp_path / "images", latency_seconds=0, json=True)
    assert validate_run(options) == 0
    engines = json.loads(capsys.readouterr().out)["engines"]
    assert [one["accuracy"]["stage"] for one in engines] == ["onnx-slim", "onnx-slim", "engine-openvino"]
    assert len({one["accuracy"]["top1"] for one in engines}) == 1


@pytest.mark.parametrize(
    ("times", "opened"),
    [((1.0, 2.0), "ort"), ((2.0, 1.0), "openvino"), ((None, None), "openvino"), ((3.0, None), "ort")],
)
def test_the_engine_that_was_fastest_is_opened(
    outcome: Outcome, tmp_path: Path, times: tuple[float | None, float | None], opened: str
) -> None:
    def say(record: dict[str, Any]) -> None:
        for one, ms in zip(record["engines"], times, strict=True):
            one["ms"] = ms

    bundle = changed(outcome.bundle, tmp_path / "bundle", say)
    with np.load(bundle / "golden.npz", allow_pickle=False) as golden, open_runner(bundle) as runner:
        assert (runner.engine, runner.path) == (opened, {"ort": "model.onnx", "openvino": "engine/model.xml"}[opened])
        np.testing.assert_allclose(runner.infer(golden["inputs"]), golden["slim_logits"], atol=1e-4)
        first = runner.infer(golden["inputs"])
        with open_runner(bundle, "openvino", hint="throughput") as several:
            many = several.infer(np.tile(golden["inputs"], (4, 1, 1, 1)))
        np.testing.assert_allclose(many, np.tile(first, (4, 1)), atol=1e-4)


def test_an_engine_for_a_gpu_comes_before_those_for_a_cpu(outcome: Outcome) -> None:
    first, second = load_manifest(outcome.bundle).engines
    gpu = second.engine.model_copy(update={"backend": "tensorrt", "targets": ["sm89"]})
    third = second.model_copy(update={"name": "trt", "stage": "engine-trt", "engine": gpu})
    timed = [first.model_copy(update={"ms": 2.0}), second.model_copy(update={"ms": 1.0}), third]
    manifest = load_manifest(outcome.bundle).model_copy(update={"engines": timed})
    assert [one.backend for one in fastest_first(manifest)] == ["tensorrt", "openvino", "onnxruntime"]


def test_damage_to_the_second_engine_is_found(outcome: Outcome, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(outcome.bundle, tmp_path / "bundle"))
    weights = bundle / "engine" / "model.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    verdict = check_bundle(bundle)
    assert verdict.exit_code == 3
    assert "model.bin: its SHA-256 is not the one in manifest.json" in verdict.faults[0]
    with pytest.raises(InputRejected, match=r"model\.bin"):
        open_runner(bundle, "openvino")
    with open_runner(bundle, "ort") as runner:
        assert runner.engine == "ort"
    weights.unlink()
    assert "is missing" in check_bundle(bundle).faults[0]


def _alone(record: dict[str, Any]) -> None:
    record["engines"] = record["engines"][:1]


def _other_first(record: dict[str, Any]) -> None:
    record["engines"].reverse()


def _twice(record: dict[str, Any]) -> None:
    record["engines"][1]["name"] = "ort"


def _no_rung(record: dict[str, Any]) -> None:
    record["engines"][1]["stage"] = "engine-elsewhere"


def _not_run(record: dict[str, Any]) -> None:
    record["engines"][1]["engine"]["status"] = "not executed"


def _no_graph(record: dict[str, Any]) -> None:
    record["engines"][1]["onnx"] = "plan.json"


def _lost_file(record: dict[str, Any]) -> None:
    record["engines"][1]["engine"]["files"] = ["engine/other.xml"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_alone, "engines: must be several"),
        (_other_first, "engine and macs those of the first"),
        (_twice, "a name or a stage is given twice"),
        (_no_rung, "no rung engine-elsewhere"),
        (_not_run, "its status is 'not executed'"),
        (_no_graph, "plan.json is no file of onnx"),
        (_lost_file, "lacks engine/other.xml"),
    ],
)
def test_records_of_engines_that_cannot_be_are_refused(
    outcome: Outcome, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    record = read(outcome.bundle / "manifest.json")
    change(record)
    with pytest.raises(ValueError, match=named):
        Manifest.model_validate(record)


def test_macs_that_the_plan_does_not_give_are_refused(outcome: Outcome, tmp_path: Path) -> None:
    def say(record: dict[str, Any]) -> None:
        macs = record["engines"][1]["macs"]
        record["engines"][1]["macs"] = macs | {"slim": macs["slim"] + 1, "reduction": 1 - (macs["slim"] + 1) / macs["dense"]}

    verdict = check_bundle(changed(outcome.bundle, tmp_path / "bundle", say))
    assert verdict.exit_code == 3
    assert "engines.openvino.macs of the plan" in verdict.faults[0]


def test_any_engine_that_fails_fails_the_ladder(outcome: Outcome) -> None:
    first, second = outcome.attempts
    rungs = [
        one.model_copy(update={"status": "failed"}) if one.stage == "engine-openvino" else one for one in second.parity.rungs
    ]
    engine = second.parity.engine.model_copy(update={"status": "failed"})
    parity = second.parity.model_copy(update={"rungs": rungs, "engine": engine, "passed": False})
    assert joined([first, second], outcome.plan, {}).passed
    assert not joined([first, dataclasses.replace(second, parity=parity)], outcome.plan, {}).passed


def test_a_second_run_makes_nothing_anew(outcome: Outcome, export_work: Path) -> None:
    before, bundle = stages_in(export_work), digests(outcome.bundle)
    again = export_bundle(tiny(export_work, "several", engine="ort,openvino", precision="fp32"))
    assert stages_in(export_work) == before
    assert digests(again.bundle) == bundle


def test_what_differs_from_a_bundle_of_one(outcome: Outcome, ort_export: Outcome) -> None:
    found = compare_bundles(ort_export.bundle, outcome.bundle)
    assert "engines: ort -> ort, openvino" in [one.said for one in found.differences if one.topic == "engine"]
    accuracy = [one.said for one in found.differences if one.topic == "accuracy"]
    assert len(accuracy) == 1
    assert accuracy[0].startswith("engine-openvino: not there -> top-1")


def test_the_dry_run_describes_each(export_work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny(export_work, "several", engine="ort,openvino", dry_run=True, json=True)) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["backend"] == "onnxruntime"
    assert described["engines"] == [
        {"engine": "ort", "backend": "onnxruntime", "targets": ["cpu"], "precision": "fp32", "layout": "split"},
        {"engine": "openvino", "backend": "openvino", "targets": ["cpu"], "precision": "auto", "layout": "split"},
    ]
    assert "left_out" not in described
    assert run(tiny(export_work, "several", engine="ort,openvino", dry_run=True)) == 0
    assert "openvino for cpu, auto, split qkv" in capsys.readouterr().out
    assert run(tiny(export_work, "several", dry_run=True, json=True)) == 0
    assert "engines" not in json.loads(capsys.readouterr().out)


def test_the_bundle_is_named_by_its_engines(tmp_path: Path) -> None:
    assert tiny(tmp_path, engine="ort,openvino", output=None).bundle == Path("bundles/vit_tiny_patch16_224-ort-openvino")
    assert tiny(tmp_path, engine="trt", output=None).bundle == Path("bundles/vit_tiny_patch16_224-trt")
    assert parse_engines("trt,ort") == ("trt", "ort")


def test_each_engine_has_the_options_that_are_for_it(tmp_path: Path) -> None:
    options = tiny(
        tmp_path, engine="ort,openvino,trt", target=("sm89",), batch="1:2:4", require_fused_attention=True, keep_fp32=("x",)
    )
    options.check()
    ort, openvino, trt = (options.for_engine(name) for name in options.engines)
    assert (ort.targets, trt.targets) == ((), ("sm89",))
    assert [one.batch_profile for one in (ort, openvino, trt)] == [(1, 8, 32), (1, 8, 32), (1, 2, 4)]
    assert [one.engine_precision for one in (ort, openvino, trt)] == ["fp32", "fp32", "fp16"]
    assert [one.keep_fp32 for one in (ort, openvino, trt)] == [(), ("x",), ()]
    assert [one.require_fused_attention for one in (ort, openvino, trt)] == [False, False, True]
    assert (options.layout, options.search_layout) == ("split", "packed")
    assert tiny(tmp_path, engine="ort,openvino").search_layout == "split"


def test_all_takes_what_is_here_and_says_why_not_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "tensorrt", "tensorrt_rtx")
    begun = begin(tiny(tmp_path / "work", engine="all", output=None))
    assert begun.options.engines == ("ort", "openvino")
    assert begun.options.bundle.name.endswith("-ort-openvino")
    assert list(begun.left_out) == ["trt"]
    assert "pip install" in begun.left_out["trt"]
    assert run(tiny(tmp_path / "work", engine="all", precision="bf16", dry_run=True, json=True)) == 0
    assert json.loads(capsys.readouterr().out)["left_out"]["ort"] == "takes fp32, fp16, int8, not bf16"
    assert run(tiny(tmp_path / "work", engine="all", precision="bf16", dry_run=True)) == 0
    assert "left out ort" in capsys.readouterr().out
    without(monkeypatch, "openvino", "onnxruntime")
    with pytest.raises(Unavailable, match=r"--engine all: none works here: ort: .*pip install.*openvino: .*trt: ") as caught:
        begin(tiny(tmp_path / "work", engine="all"))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("absent", ["openvino", "onnxruntime"])
def test_a_named_engine_that_is_not_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    without(monkeypatch, absent)
    with pytest.raises(Unavailable, match=r"is not installed; install it: pip install") as caught:
        export_bundle(tiny(tmp_path / "work", engine="ort,openvino"))
    assert caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_int8_graphs_that_keep_other_parts_lie_side_by_side(export_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine is judged by its own rung, so that one may keep a block that the other does not."""
    pytest.importorskip("nncf")
    options = tiny(export_work, "several-int8", engine="ort,openvino", precision="int8")
    manifest = load_manifest(export_bundle(options).bundle)
    assert [one.onnx for one in manifest.engines] == ["model.int8.onnx"] * 2  # nothing is kept by either
    assert [rung.stage for rung in manifest.rungs] == [*RUNGS[:3], "onnx-slim-int8", *RUNGS[3:]]
    assert check_bundle(options.bundle, engines=EVERY).passed

    def lost(found: Attempt) -> bool:
        return found.request.engine == "openvino" and not found.kept

    monkeypatch.setattr("export.precision._lost_by_quantisation", lost)
    manifest = load_manifest(export_bundle(options).bundle)
    assert [one.onnx for one in manifest.engines] == ["model.int8.onnx", "model.openvino.int8.onnx"]
    assert [len(one.kept_parts) for one in manifest.engines] == [0, 1]
    rungs = {rung.stage: rung for rung in manifest.rungs}
    assert list(rungs) == [*RUNGS[:3], "onnx-slim-int8", "engine", "onnx-slim-openvino-int8", "engine-openvino"]
    assert rungs["engine-openvino"].compared_to == "onnx-slim-openvino-int8"
    assert rungs["onnx-slim-openvino-int8"].max_error != rungs["onnx-slim-int8"].max_error
    assert serving_facts(manifest).runnable == "model.int8.onnx"
    verdict = check_bundle(options.bundle, engines=EVERY)
    assert verdict.exit_code == 0, verdict.faults


@pytest.mark.slow
@pytest.mark.parametrize("engines", ["ort,openvino,trt", "trt,ort"])
def test_tensorrt_beside_the_engines_for_a_cpu(export_work: Path, engines: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    outcome = export_bundle(tiny(export_work, engines.replace(",", "-"), engine=engines, target=("sm89",)))
    manifest = load_manifest(outcome.bundle)
    trt = manifest.bundled("tensorrt_rtx")
    ort = manifest.bundled("onnxruntime")
    assert trt is not None
    assert ort is not None
    first = engines.startswith("trt")
    assert trt.onnx == ("model.fp16.onnx" if first else "model.packed.fp16.onnx")
    assert ort.onnx == ("model.split.onnx" if first else "model.onnx")
    assert (trt.macs.layout, ort.macs.layout) == ("packed", "split")
    assert trt.macs.slim > ort.macs.slim
    assert manifest.macs == (trt if first else ort).macs
    rungs = {rung.stage: rung for rung in manifest.rungs}
    assert rungs[trt.stage].note.startswith("built, not executed")
    assert rungs[trt.stage].status == trt.engine.status == "not executed"
    assert rungs["onnx-slim" if first else "onnx-slim-packed"].status == "passed"
    assert trt.engine.fused_attentions == trt.engine.attentions == 3
    recipe = read(outcome.bundle / "recipe.json")
    assert (recipe["onnx"]["path"], recipe["expected"]["fused_attentions"]) == (trt.onnx, 3)
    facts = serving_facts(manifest)
    assert (facts.runnable, facts.onnx) == (ort.onnx, trt.onnx)
    verdict = check_bundle(outcome.bundle, engines=EVERY)
    assert verdict.exit_code == 0, verdict.faults
    idle = {check.name: check.status for check in verdict.checks if "tensorrt_rtx" in check.name or check.name == "engine ran"}
    assert set(idle.values()) == {"not executed"}
    with open_runner(outcome.bundle) as runner:
        assert runner.engine in ("ort", "openvino")


@pytest.mark.slow
def test_nothing_is_published_where_the_second_engine_fails_a_gate(export_work: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = tiny(
        export_work, "unfused-second", engine="ort,trt", target=("sm89",), precision="fp32", require_fused_attention=True
    )
    with pytest.raises(GateFailed, match="engine-trt: 0 of 3 attentions are one kernel each") as caught:
        export_bundle(options)
    assert caught.value.exit_code == 5
    assert not options.bundle.exists()
    assert load_manifest(caught.value.outcome.bundle).bundled("tensorrt_rtx") is not None


@pytest.mark.slow
def test_a_latency_budget_is_timed_on_the_first_engine(export_work: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = tiny(export_work, "budget", engine="ort,trt", target=("sm89",), latency_reduction=0.2, batch_size=2, fit="none")
    outcome = export_bundle(options)
    table = load_table(outcome.bundle / "latency_table.json")
    assert (table.engine, table.layout) == ("ort", "split")
    assert table.of(outcome.plan.counts) <= 0.8 * table.dense()
    assert check_bundle(outcome.bundle).passed
