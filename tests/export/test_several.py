"""Several engines in one bundle: one plan, one ladder, each engine with its own precision, files and rung."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export import export_bundle
from export.begin import begin
from export.engine_times import engine_times
from export.report.page import REPORT
from export.serving.facts import serving_facts
from export.several import joined
from export.summary import as_json, print_summary
from tests.helpers.exports import digests, read, stages_in, tiny
from validate import check_bundle, load_manifest
from validate.bundle_differences import compare_bundles
from validate.engine_runs import EngineChoice

pytest.importorskip("openvino")

if TYPE_CHECKING:
    from export.pipeline import Outcome
    from export.precision import Attempt

RUNGS = ["pytorch", "pytorch-slim", "onnx-slim", "engine", "engine-openvino"]
EVERY = EngineChoice(None)


def test_one_ladder_has_the_rungs_of_both(several_export: Outcome) -> None:
    manifest, parity = (read(several_export.bundle / name) for name in ("manifest.json", "parity.json"))
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


def test_engines_for_a_cpu_are_timed_in_turn_and_once(several_export: Outcome, export_work: Path) -> None:
    work = begin(tiny(export_work, "several", engine="ort,openvino")).work
    engines = {one.request.engine: one.timed for one in several_export.attempts}
    times = engine_times(engines, work, "engines")
    assert list(times) == ["ort", "openvino"]
    assert all(ms > 0 for ms in times.values())
    assert engine_times(engines, work, "engines") == times
    stated = joined(several_export.attempts, several_export.plan, times).engines
    assert [(one.ms, one.batch) for one in stated] == [(times["ort"], 8), (times["openvino"], 8)]


def test_what_is_printed_names_both(several_export: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    timed = joined(several_export.attempts, several_export.plan, {"ort": 1.0, "openvino": 2.0})
    several_export = dataclasses.replace(several_export, parity=timed)
    printed = as_json(several_export)["engines"]
    assert [(one["name"], one["built"]) for one in printed] == [("ort", "executed"), ("openvino", "executed")]
    print_summary(several_export)
    shown = capsys.readouterr().out
    assert "engine-openvino" in shown
    assert shown.count("ms a batch of 8") == 2
    page = (several_export.bundle / REPORT).read_text(encoding="utf-8")
    assert "The engines" in page
    assert page.count("engine-openvino") >= 2
    facts = serving_facts(load_manifest(several_export.bundle))
    assert (facts.runnable, facts.onnx, facts.ir) == ("model.onnx", "model.onnx", "engine/model.xml")


def test_any_engine_that_fails_fails_the_ladder(several_export: Outcome) -> None:
    first, second = several_export.attempts
    rungs = [
        one.model_copy(update={"status": "failed"}) if one.stage == "engine-openvino" else one for one in second.parity.rungs
    ]
    engine = second.parity.engine.model_copy(update={"status": "failed"})
    parity = second.parity.model_copy(update={"rungs": rungs, "engine": engine, "passed": False})
    assert joined([first, second], several_export.plan, {}).passed
    assert not joined([first, dataclasses.replace(second, parity=parity)], several_export.plan, {}).passed


def test_a_second_run_makes_nothing_anew(several_export: Outcome, export_work: Path) -> None:
    before, bundle = stages_in(export_work), digests(several_export.bundle)
    again = export_bundle(tiny(export_work, "several", engine="ort,openvino", precision="fp32"))
    assert stages_in(export_work) == before
    assert digests(again.bundle) == bundle


def test_what_differs_from_a_bundle_of_one(several_export: Outcome, ort_export: Outcome) -> None:
    found = compare_bundles(ort_export.bundle, several_export.bundle)
    assert "engines: ort -> ort, openvino" in [one.said for one in found.differences if one.topic == "engine"]
    accuracy = [one.said for one in found.differences if one.topic == "accuracy"]
    assert len(accuracy) == 1
    assert accuracy[0].startswith("engine-openvino: not there -> top-1")


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
