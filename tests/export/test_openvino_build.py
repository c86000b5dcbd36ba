"""OpenVINO as the engine: its rung is measured, its IR goes along and is run from there, and what it cannot do is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from export import export_bundle
from export.engines import openvino_build
from export.engines.build import build_engine
from export.logits import OPENVINO_CACHE
from patchslim.blob_cache import keep_blob
from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.openvino_settings import OpenVinoSettings
from tests.helpers.bundles import only_for_onnxruntime, reseal, weight, write_onnx
from tests.helpers.exports import EVALUATION, read, stages_in, tiny
from validate import check_bundle
from validate.engine_runs import EngineChoice
from validate.parity import TOLERANCES

pytest.importorskip("openvino")
from patchslim.openvino_runner import OpenVinoRunner, computes_bfloat16

if TYPE_CHECKING:
    from export.pipeline import Outcome

PRECISIONS = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not computes_bfloat16(), reason="no bfloat16 here"))]
HINTS = {"fp32": "f32", "bf16": "bf16"}
OPENVINO = EngineChoice(("openvino",))


@pytest.fixture(scope="module", params=PRECISIONS)
def outcome(request: pytest.FixtureRequest, export_work: Path) -> Outcome:
    return export_bundle(tiny(export_work, f"openvino-{request.param}", engine="openvino", precision=request.param))


def test_the_engine_is_measured_and_recorded(outcome: Outcome) -> None:
    record = read(outcome.bundle / "manifest.json")
    precision = record["precision"]
    assert [rung["stage"] for rung in record["rungs"]] == ["pytorch", "pytorch-slim", "onnx-slim", "engine"]
    rung = record["rungs"][-1]
    assert (rung["images"], rung["status"], rung["compared_to"]) == (EVALUATION, "passed", "onnx-slim")
    assert rung["tolerance"] == TOLERANCES[precision]  # no logit of it is above 1
    assert 0 < rung["max_error"] < rung["tolerance"]
    assert (rung["max_error"] > 1e-4) == (precision == "bf16")  # it was really computed in that
    engine = record["engine"]
    assert (engine["backend"], engine["targets"], engine["status"]) == ("openvino", ["cpu"], "passed")
    assert engine["settings"] == {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
    assert engine["files"] == ["engine/model.xml", "engine/model.bin"]
    assert record["target"]["engine"] == "openvino"
    assert read(outcome.bundle / "recipe.json")["expected"]["precision"] == "fp32"  # of the ONNX file


def test_the_ir_of_the_bundle_is_run_from_there(outcome: Outcome, tmp_path: Path) -> None:
    precision = outcome.engine.precision
    verdict = check_bundle(outcome.bundle, engines=OPENVINO)
    assert verdict.exit_code == 0, verdict.faults
    found = {run.file: run for run in verdict.engines}
    assert list(found) == ["model.onnx", "engine/model.xml"]
    assert [run.on for run in found.values()] == ["CPU, f32", f"CPU, {HINTS[precision]}"]
    golden = found["engine/model.xml"].golden
    assert golden is not None
    assert golden.tolerance == pytest.approx(TOLERANCES[precision])
    assert (outcome.bundle / "serving/triton/openvino/config.pbtxt").read_text().count('"model.xml"') == 1


def test_an_ir_of_another_model_does_not_pass(outcome: Outcome, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(outcome.bundle, tmp_path / "bundle"))
    weights = bundle / "engine" / "model.bin"
    data = weights.read_bytes()
    whole = len(data) // 4 * 4
    values = np.frombuffer(data[:whole], dtype=np.float32).copy()
    values[(np.abs(values) > 1e-4) & (np.abs(values) < 10)] *= -1  # weights; integers look like tiny numbers
    weights.write_bytes(values.tobytes() + data[whole:])
    assert check_bundle(bundle, engines=OPENVINO).exit_code == 3  # another digest: nothing is loaded
    (bundle / "recipe.json").unlink()  # which reseal would make anew, of a model of its own
    reseal(bundle)
    verdict = check_bundle(bundle, engines=OPENVINO)
    assert verdict.exit_code == 5, verdict.checks
    assert "engine/model.xml" in verdict.faults[0]


@pytest.mark.parametrize("change", ["no XML", "a list"])
def test_what_is_no_ir_is_refused(outcome: Outcome, change: str, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(outcome.bundle, tmp_path / "bundle"))
    if change == "no XML":
        (bundle / "engine" / "model.xml").write_bytes(b"PK\x03\x04" + bytes(60))
    else:  # its weights are not named
        stated = read(bundle / "manifest.json")
        stated["files"] = [file for file in stated["files"] if file["path"] != "engine/model.bin"]
        for name in ("manifest.json", "parity.json"):
            record = stated if name == "manifest.json" else read(bundle / name)
            record["engine"]["files"] = ["engine/model.xml"]
            (bundle / name).write_text(json.dumps(record))
        (bundle / "engine" / "model.bin").unlink()
    (bundle / "recipe.json").unlink()
    reseal(bundle)
    verdict = check_bundle(bundle, engines=OPENVINO)
    assert verdict.exit_code == 3
    assert ("is no IR of OpenVINO" if change == "no XML" else "model.bin: is not listed") in verdict.faults[0]


def test_without_openvino_its_engine_is_named_and_the_rest_passes(outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else there(name))
    verdict = check_bundle(outcome.bundle, engines=EngineChoice(None))
    found = next(check for check in verdict.checks if check.name == "golden parity, openvino")
    assert (verdict.exit_code, found.status) == (0, "not executed")
    assert 'openvino is not installed; install it: pip install ".[openvino]"' in found.detail


def test_what_openvino_compiled_is_kept_and_damage_to_it_is_harmless(
    outcome: Outcome, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    precision = HINTS[outcome.engine.precision]
    xml = outcome.engine.files[0]
    images = np.random.default_rng(0).standard_normal((1, 3, 48, 48)).astype(np.float32)

    def answers() -> np.ndarray:
        with OpenVinoRunner(xml, OpenVinoSettings(precision, threads=1, cache=tmp_path / OPENVINO_CACHE)) as runner:
            assert runner.precision == precision
            return runner.infer(images)

    first = answers()
    (blob,) = (tmp_path / OPENVINO_CACHE).iterdir()
    np.testing.assert_array_equal(answers(), first)
    whole = blob.read_bytes()
    damaged = [whole[: len(whole) // 2], b"", b"no blob"]
    for place in (0.001, 0.2, 0.5, 0.9):  # OpenVINO's own cache loads these, and answers wrongly
        at = int(place * len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    for data in damaged:
        blob.write_bytes(data)
        np.testing.assert_array_equal(answers(), first)
        assert blob.read_bytes() != data  # compiled anew
        assert caplog.messages == [f"{blob}: is not used, since it is damaged; it is made anew"]
        caplog.clear()
    keep_blob(blob, b"whole, and nothing that OpenVINO compiled")
    np.testing.assert_array_equal(answers(), first)
    assert "since OpenVINO does not take it here" in caplog.messages[0]


def test_what_was_compiled_of_another_model_or_for_another_setting_is_not_taken(outcome: Outcome, tmp_path: Path) -> None:
    xml = Path(shutil.copytree(outcome.engine.files[0].parent, tmp_path / "engine")) / outcome.engine.files[0].name
    settings = OpenVinoSettings(threads=1, cache=tmp_path / OPENVINO_CACHE)
    images = np.ones((1, 3, 48, 48), dtype=np.float32)
    with OpenVinoRunner(xml, settings) as runner:
        first = runner.infer(images)
    with OpenVinoRunner(xml, dataclasses.replace(settings, hint="throughput")) as runner:
        np.testing.assert_allclose(runner.infer(images), first, atol=1e-5)
    assert len(list((tmp_path / OPENVINO_CACHE).iterdir())) == 2
    weights = xml.with_suffix(".bin")
    data = np.frombuffer(weights.read_bytes(), dtype=np.uint8).copy()
    data[: len(data) // 4 * 4].view(np.float32)[np.abs(data[: len(data) // 4 * 4].view(np.float32)) > 1e-4] *= -1
    weights.write_bytes(data.tobytes())  # as large, and of the same time to the second
    with OpenVinoRunner(xml, settings) as runner:
        assert np.abs(runner.infer(images) - first).max() > 1e-4


def test_the_hint_is_kept_and_can_be_changed_where_it_runs(export_work: Path) -> None:
    options = tiny(export_work, "throughput", engine="openvino", precision="fp32", hint="throughput")
    bundle = export_bundle(options).bundle
    assert read(bundle / "manifest.json")["engine"]["settings"]["PERFORMANCE_HINT"] == "THROUGHPUT"
    for choice, on in ((OPENVINO, "CPU, f32, throughput"), (dataclasses.replace(OPENVINO, hint="latency"), "CPU, f32")):
        verdict = check_bundle(bundle, engines=choice)
        assert verdict.exit_code == 0, verdict.faults
        assert [run.on for run in verdict.engines if run.file == "engine/model.xml"] == [on]


def test_an_ir_is_the_same_bytes_again(outcome: Outcome, tmp_path: Path) -> None:
    onnx, precision = outcome.bundle / "model.onnx", outcome.engine.precision
    built = [build_engine("openvino", onnx, tmp_path / name, precision=precision) for name in ("a", "b")]
    first, second = ([file.read_bytes() for file in one.files] for one in built)
    assert first == second
    assert b"<net name" in first[0]


def test_what_cannot_be_is_refused_before_anything_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--precision fp16: openvino takes fp32, bf16.*"):
        export_bundle(tiny(tmp_path / "work", engine="openvino", precision="fp16"))
    with pytest.raises(UsageError, match="--target needs --engine trt"):
        export_bundle(tiny(tmp_path / "work", engine="openvino", target=("sm89",)))
    monkeypatch.setattr(openvino_build, "computes_bfloat16", lambda: False)
    with pytest.raises(Unavailable, match="this CPU has no bfloat16"):
        export_bundle(tiny(tmp_path / "work", engine="openvino", precision="bf16"))
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else there(name))
    with pytest.raises(Unavailable, match=r"OpenVINO is not installed; install it: pip install .*\[openvino\]"):
        export_bundle(tiny(tmp_path / "work", engine="openvino"))
    assert not (tmp_path / "work").exists() or stages_in(tmp_path / "work") == {}


def test_a_graph_that_openvino_cannot_read(tmp_path: Path) -> None:
    write_onnx(tmp_path / "model.onnx", weight())
    only_for_onnxruntime(tmp_path / "model.onnx")
    with pytest.raises(InputRejected, match=r"model\.onnx: OpenVINO cannot load it"):
        build_engine("openvino", tmp_path / "model.onnx", tmp_path / "out", precision="fp32")
