"""A bundle of several engines where it is used: checked, measured and opened, and what its records may not say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from patchslim.errors import InputRejected, Unavailable
from tests.helpers.bundles import reseal
from tests.helpers.exports import read, without
from validate import check_bundle, load_manifest, open_runner
from validate.attestation import attest, check_attestation
from validate.bundle_runner import fastest_first
from validate.engine_runs import EngineChoice
from validate.manifest import Manifest
from validate.options import ValidateOptions
from validate.run import run as validate_run

pytest.importorskip("openvino")

if TYPE_CHECKING:
    from export.pipeline import Outcome

EVERY = EngineChoice(None)


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


def test_every_engine_is_checked_where_it_works(
    several_export: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = check_bundle(several_export.bundle, engines=EVERY)
    assert verdict.exit_code == 0, verdict.faults
    assert [(one.engine, one.file) for one in verdict.engines] == [
        ("ort", "model.onnx"),
        ("openvino", "model.onnx"),
        ("openvino", "engine/model.xml"),
    ]
    attestation = tmp_path / "attestation.json"
    attestation.write_text(attest(verdict, [], None).model_dump_json(exclude={"error"}))
    known = check_bundle(several_export.bundle, engines=EngineChoice(()))
    assert [check.status for check in check_attestation(attestation, several_export.bundle, known)] == ["passed"] * 2
    without(monkeypatch, "openvino")
    verdict = check_bundle(several_export.bundle, engines=EVERY)
    idle = next(check for check in verdict.checks if check.name == "golden parity, openvino")
    assert (verdict.exit_code, idle.status, idle.subject) == (0, "not executed", "engine/model.xml, engine/model.bin")
    with pytest.raises(Unavailable, match="--engine openvino: openvino is not installed"):
        check_bundle(several_export.bundle, engines=EngineChoice(("openvino",)))


def test_each_is_measured_on_images_of_the_device(
    several_export: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(several_export.bundle)
    with np.load(several_export.bundle / "golden.npz", allow_pickle=False) as golden:
        for image in manifest.golden_images:
            folder = tmp_path / "images" / manifest.labels[int(golden["labels"][image.row])]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(several_export.bundle / image.path, folder)
    options = ValidateOptions(several_export.bundle, images=tmp_path / "images", latency_seconds=0, json=True)
    assert validate_run(options) == 0
    engines = json.loads(capsys.readouterr().out)["engines"]
    assert [one["accuracy"]["stage"] for one in engines] == ["onnx-slim", "onnx-slim", "engine-openvino"]
    assert len({one["accuracy"]["top1"] for one in engines}) == 1


@pytest.mark.parametrize(
    ("times", "opened"),
    [((1.0, 2.0), "ort"), ((2.0, 1.0), "openvino"), ((None, None), "openvino"), ((3.0, None), "ort")],
)
def test_the_engine_that_was_fastest_is_opened(
    several_export: Outcome, tmp_path: Path, times: tuple[float | None, float | None], opened: str
) -> None:
    def say(record: dict[str, Any]) -> None:
        for one, ms in zip(record["engines"], times, strict=True):
            one["ms"] = ms

    bundle = changed(several_export.bundle, tmp_path / "bundle", say)
    with np.load(bundle / "golden.npz", allow_pickle=False) as golden, open_runner(bundle) as runner:
        assert (runner.engine, runner.path) == (opened, {"ort": "model.onnx", "openvino": "engine/model.xml"}[opened])
        np.testing.assert_allclose(runner.infer(golden["inputs"]), golden["slim_logits"], atol=1e-4)
        first = runner.infer(golden["inputs"])
        with open_runner(bundle, "openvino", hint="throughput") as several:
            many = several.infer(np.tile(golden["inputs"], (4, 1, 1, 1)))
        np.testing.assert_allclose(many, np.tile(first, (4, 1)), atol=1e-4)


def test_an_engine_for_a_gpu_comes_before_those_for_a_cpu(several_export: Outcome) -> None:
    first, second = load_manifest(several_export.bundle).engines
    gpu = second.engine.model_copy(update={"backend": "tensorrt", "targets": ["sm89"]})
    third = second.model_copy(update={"name": "trt", "stage": "engine-trt", "engine": gpu})
    timed = [first.model_copy(update={"ms": 2.0}), second.model_copy(update={"ms": 1.0}), third]
    manifest = load_manifest(several_export.bundle).model_copy(update={"engines": timed})
    assert [one.backend for one in fastest_first(manifest)] == ["tensorrt", "openvino", "onnxruntime"]


def test_damage_to_the_second_engine_is_found(several_export: Outcome, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(several_export.bundle, tmp_path / "bundle"))
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
    several_export: Outcome, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    record = read(several_export.bundle / "manifest.json")
    change(record)
    with pytest.raises(ValueError, match=named):
        Manifest.model_validate(record)


def test_macs_that_the_plan_does_not_give_are_refused(several_export: Outcome, tmp_path: Path) -> None:
    def say(record: dict[str, Any]) -> None:
        macs = record["engines"][1]["macs"]
        record["engines"][1]["macs"] = macs | {"slim": macs["slim"] + 1, "reduction": 1 - (macs["slim"] + 1) / macs["dense"]}

    verdict = check_bundle(changed(several_export.bundle, tmp_path / "bundle", say))
    assert verdict.exit_code == 3
    assert "engines.openvino.macs of the plan" in verdict.faults[0]
