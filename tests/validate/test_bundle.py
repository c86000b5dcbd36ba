"""A bundle that is right passes, and what is written is what is read. What is refused is in tests/helpers/attacks."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patchslim.errors import InputRejected, Unavailable
from tests.helpers.bundles import make_bundle, refused, reseal
from validate import check_bundle, load_manifest, load_parity
from validate.bundle import list_files, record_files, write_sums
from validate.manifest import CalibrationRecord, manifest_schema
from validate.parity_records import parity_schema


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bundle"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_whole_bundle_passes(good: Path) -> None:
    told: list[str] = []
    verdict = check_bundle(good, threads=1, progress=told.append)
    assert verdict.exit_code == 0
    verdict.raise_if_failed()
    assert [check.name for check in verdict.checks if check.status != "passed"] == ["engine ran"]  # built only, here
    assert [c.subject for c in verdict.checks if c.name == "golden parity"] == ["model.onnx", "model-fp16.onnx"]
    assert "golden.npz" in told


def test_records_carry_what_was_promised(good: Path) -> None:
    for name in ("manifest.json", "parity.json"):
        record = json.loads((good / name).read_text())
        assert {"dense", "slim", "reduction"} <= set(record["macs"])
        assert {"backend", "targets", "precision", "fused_attentions"} <= set(record["engine"])
        for rung in record["rungs"]:
            assert {"stage", "images", "top1", "top5", "top1_drop", "agreement", "status"} <= set(rung)
    assert load_manifest(good).rungs == load_parity(good).rungs
    assert {"macs", "rungs", "files"} <= set(manifest_schema()["properties"])  # type: ignore[call-overload]
    assert {"gate", "passed"} <= set(parity_schema()["properties"])  # type: ignore[call-overload]


def test_the_same_build_gives_the_same_bytes(good: Path, tmp_path: Path) -> None:
    again = make_bundle(tmp_path / "again")
    assert record_files(again) == record_files(good)
    assert (again / "manifest.json").read_bytes() == (good / "manifest.json").read_bytes()


def test_not_a_folder(bundle: Path, tmp_path: Path) -> None:
    refused(bundle / "model.onnx", 3, "not a folder")
    refused(tmp_path / "nowhere", 3, "not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", 3, "manifest.json: is missing")


def test_calibration_is_the_plans(bundle: Path) -> None:
    calibration = {"data": "digits (train)", "images": 100, "fingerprint": "0" * 64}
    stated = CalibrationRecord(**calibration, share=0.2)  # type: ignore[arg-type]
    reseal(bundle, calibration=stated)
    refused(bundle, 3, "plan.json", "calibration of the plan: ('digits', 4")
    edit(bundle / "plan.json", lambda p: p["origin"].update(calibration=calibration))
    reseal(bundle, calibration=stated)
    assert check_bundle(bundle).exit_code == 0
    reseal(bundle, calibration=stated.model_copy(update={"images": 99}))
    refused(bundle, 3, "plan.json", "calibration of the plan: ('digits (train)', 100")


def test_a_broken_bundle_is_refused_before_it_runs(bundle: Path) -> None:
    (bundle / "model-fp16.onnx").unlink()
    verdict = check_bundle(bundle)
    assert {check.name for check in verdict.checks} == {"manifest", "files"}
    with pytest.raises(InputRejected, match=r"model-fp16\.onnx"):
        verdict.raise_if_failed()


def test_an_absent_provider_is_unavailable(good: Path) -> None:
    with pytest.raises(Unavailable, match="NoSuchProvider"):
        check_bundle(good, provider="NoSuchProvider")


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "golden.npz", "parity.json", "plan.json", pytest.param("model.onnx", marks=pytest.mark.slow)],
)
def test_any_damage_ends_in_an_exit_code(bundle: Path, name: str) -> None:
    rng = random.Random(name)
    whole = {other: (bundle / other).read_bytes() for other in ("manifest.json", name)}
    codes = set()
    for _ in range(25):
        data = bytearray(whole[name])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        (bundle / name).write_bytes(data)
        if name != "manifest.json":
            reseal(bundle)
        codes.add(check_bundle(bundle, threads=1).exit_code)
        for other, data in whole.items():
            (bundle / other).write_bytes(data)
    assert 3 in codes
    assert codes <= {0, 3, 5}  # a changed weight may still answer within the tolerance


def test_sha256sum_checks_the_sums(bundle: Path) -> None:
    write_sums(bundle, load_manifest(bundle))
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {line.removesuffix(": OK") for line in done.stdout.splitlines()} == set(list_files(bundle)) - {"SHA256SUMS"}
    assert check_bundle(bundle).passed
    assert record_files(bundle) == load_manifest(bundle).files


@pytest.mark.parametrize("change", [lambda text: text + b"\n", lambda text: text[65:], lambda text: text.replace(b"a", b"b")])
def test_sums_that_say_something_else_are_refused(bundle: Path, change: Callable[[bytes], bytes]) -> None:
    write_sums(bundle, load_manifest(bundle))
    sums = bundle / "SHA256SUMS"
    sums.write_bytes(change(sums.read_bytes()))
    verdict = check_bundle(bundle)
    assert verdict.exit_code == 3
    assert "SHA256SUMS" in verdict.faults[0]
