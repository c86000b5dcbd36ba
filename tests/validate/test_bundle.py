"""A bundle that is right passes; every way of breaking one that we thought of is refused by name with the right exit code."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patchslim.errors import InputRejected, Unavailable
from tests.helpers.bundles import make_bundle, refused, reseal
from validate import check_bundle, load_manifest, load_parity
from validate.bundle import record_files
from validate.manifest import CalibrationRecord, manifest_schema, parity_schema


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


@pytest.mark.parametrize("name", ["model.onnx", "plan.json", "golden.npz", "parity.json"])
def test_truncated_flipped_empty_missing(bundle: Path, name: str) -> None:
    path = bundle / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(bundle, 3, name, "truncated")
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    refused(bundle, 3, name, "SHA-256")
    path.write_bytes(b"")
    refused(bundle, 3, name, "0 bytes")
    path.unlink()
    refused(bundle, 3, name, "missing")


def test_an_unlisted_file(bundle: Path) -> None:
    (bundle / "sub").mkdir()
    (bundle / "sub" / "extra.bin").write_bytes(b"x")
    refused(bundle, 3, "sub/extra.bin", "not listed")


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "a//b", "C:x", "a\\b", "", ".", "a\nb"])
def test_a_path_out_of_the_bundle(bundle: Path, path: str) -> None:
    (bundle.parent / "outside").write_bytes(b"")
    record = {"path": path, "size": 0, "sha256": "0" * 64}
    edit(bundle / "manifest.json", lambda m: m["files"].append(record))
    refused(bundle, 3, "manifest.json", "files.8.path", "plain relative path")


def test_links_are_refused(bundle: Path) -> None:
    outside = bundle.parent / "model.onnx"
    shutil.move(bundle / "model.onnx", outside)
    (bundle / "model.onnx").symlink_to(outside)
    refused(bundle, 3, "model.onnx", "link")
    (bundle / "model.onnx").unlink()
    (bundle / "folder").symlink_to(bundle.parent)
    refused(bundle, 3, "folder", "link")
    (bundle / "folder").unlink()
    os.mkfifo(bundle / "pipe")
    refused(bundle, 3, "pipe", "special file")


def test_a_manifest_that_is_a_link(bundle: Path) -> None:
    shutil.move(bundle / "manifest.json", bundle.parent / "manifest.json")
    (bundle / "manifest.json").symlink_to(bundle.parent / "manifest.json")
    refused(bundle, 3, "manifest.json", "not a regular file")


@pytest.mark.parametrize(
    ("text", "word"),
    [("", "empty"), ("{", "Invalid JSON"), ("[]", "object"), ("{}", "Field required"), ("\xff", "Invalid JSON")],
)
def test_a_manifest_that_is_none(bundle: Path, text: str, word: str) -> None:
    (bundle / "manifest.json").write_text(text)
    refused(bundle, 3, "manifest.json", word)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: m.update(schema_version=2), "schema_version"),
        (lambda m: m.update(colour="red"), "colour"),
        (lambda m: m["macs"].update(reduction=0.9), "reduction"),
        (lambda m: m["rungs"][1].update(top1_drop=0.1), "top1_drop"),
        (lambda m: m["engine"].update(status="passed"), "its rung says otherwise"),
        (lambda m: m["onnx"][0].update(max_error=None) or m["onnx"][1].update(max_error=None), "nothing could be checked"),
        (lambda m: m["onnx"][1].update(dtype="bfloat16"), "bfloat16"),
        (lambda m: m["files"].append(m["files"][0]), "twice"),
        (lambda m: m["files"].pop(0), "lacks"),
        (lambda m: m["onnx"].pop(1), "model-fp16.onnx"),
        (lambda m: m["labels"].pop(), "labels"),
        (lambda m: m["preprocessing"].update(input_size=[3, 9, 9]), "input_size"),
        (lambda m: m["files"][0].update(size="1"), "size"),
        (lambda m: m["preprocessing"].update(crop_pct=1e-9), "more than 67108864 pixels"),
        (lambda m: m["preprocessing"].update(crop_pct=5e-324), "more than 67108864 pixels"),
    ],
)
def test_a_manifest_that_does_not_hold_together(bundle: Path, change: Callable[[dict[str, Any]], Any], word: str) -> None:
    edit(bundle / "manifest.json", change)
    refused(bundle, 3, "manifest.json", word)


def test_nan_in_a_manifest(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace('"crop_pct": 0.9', '"crop_pct": NaN'))
    refused(bundle, 3, "manifest.json", "crop_pct")


def test_not_a_folder(bundle: Path, tmp_path: Path) -> None:
    refused(bundle / "model.onnx", 3, "not a folder")
    refused(tmp_path / "nowhere", 3, "not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", 3, "manifest.json: is missing")


def test_records_that_disagree(bundle: Path) -> None:
    edit(bundle / "parity.json", lambda r: r["engine"].update(precision="int8"))
    reseal(bundle)
    refused(bundle, 3, "parity.json", "engine")


def test_a_plan_of_something_else(bundle: Path) -> None:
    edit(bundle / "plan.json", lambda p: p["kept"].pop())
    reseal(bundle)
    refused(bundle, 3, "plan.json", "tokens per block")
    (bundle / "plan.json").write_text("[" * 100_000)
    reseal(bundle)
    refused(bundle, 3, "plan.json", "not a valid plan", "Invalid JSON")
    reseal(bundle, plan_digest="0" * 64)
    refused(bundle, 3, "plan.json", "plan_digest")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda p: p.pop("mode"), "mode: Field required"),
        (lambda p: p.update(colour="red"), "colour: Extra inputs"),
        (lambda p: p["kept"].__setitem__(1, [0, 3, 2]), "kept[1]: indices must be sorted and unique"),
        (lambda p: p["kept"].__setitem__(2, [1]), "kept[2]: lacks a token that the head reads"),
        (lambda p: p["kept"].__setitem__(0, [0, 1, 2, 3]), "kept[1]: not nested in kept[0]"),
        (lambda p: p.update(grid=[2, 3]), "is not 1 prefix tokens + a 2 x 3 grid"),
        (lambda p: p["geometry"].update(embed_dim="8"), "geometry.embed_dim"),
        (lambda p: p["origin"].update(value=float("nan")), "origin.value"),
    ],
)
def test_a_sealed_plan_that_breaks_a_rule(bundle: Path, change: Callable[[dict[str, Any]], Any], fault: str) -> None:
    """The manifest's digest, model and token counts are right: the plan's own rules are what refuses it."""
    plan = json.loads((bundle / "plan.json").read_text())
    if "nested" in fault:
        plan["kept"][1] = [0, 3, 4]
    (bundle / "plan.json").write_text(json.dumps(plan))
    edit(bundle / "plan.json", change)
    counts = [len(kept) for kept in json.loads((bundle / "plan.json").read_text())["kept"]]
    reseal(bundle, tokens_per_block=counts)
    refused(bundle, 3, "plan.json", "not a valid plan", fault)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda p: p.update(model="another"), "model of the plan: another"),
        (lambda p: p["geometry"].update(head_macs=49), "macs.dense of the plan"),
        (lambda p: p["geometry"].update(packed_qkv=False, embed_dim=9), "macs.dense of the plan"),
        (lambda p: p.update(merged_into=[-1, 2, -1, -1, 3]), "macs.slim of the plan"),  # merging costs MACs in the slim model
    ],
)
def test_a_valid_plan_that_the_manifest_does_not_follow_from(
    bundle: Path, change: Callable[[dict[str, Any]], Any], fault: str
) -> None:
    edit(bundle / "plan.json", change)
    reseal(bundle)
    refused(bundle, 3, "plan.json", fault)


def test_calibration_is_the_plans(bundle: Path) -> None:
    calibration = {"data": "digits (train)", "images": 100, "fingerprint": "0" * 64}
    stated = CalibrationRecord(**calibration, share=0.2)  # type: ignore[arg-type]
    reseal(bundle, calibration=stated)
    refused(bundle, 3, "plan.json", "calibration of the plan: None")
    edit(bundle / "plan.json", lambda p: p["origin"].update(calibration=calibration))
    reseal(bundle, calibration=stated)
    assert check_bundle(bundle).exit_code == 0
    reseal(bundle, calibration=stated.model_copy(update={"images": 99}))
    refused(bundle, 3, "plan.json", "calibration of the plan: ('digits (train)', 100")


def test_a_layout_that_no_plan_has(bundle: Path) -> None:
    edit(bundle / "manifest.json", lambda m: m["macs"].update(layout="loose"))
    refused(bundle, 3, "manifest.json", "macs.layout", "'split' or 'packed'")


def test_a_build_that_failed_its_gate(bundle: Path) -> None:
    def fail(record: dict[str, Any]) -> None:
        record["rungs"][2]["status"] = "failed"

    edit(bundle / "manifest.json", fail)
    edit(bundle / "parity.json", lambda r: (fail(r), r.update(passed=False)))
    reseal(bundle)
    refused(bundle, 5, "parity.json", "onnx-slim")


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
