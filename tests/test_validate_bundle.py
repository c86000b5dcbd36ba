"""A bundle that is right passes; every way of breaking one that we thought of is refused by name with the right exit code."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_factory import CLASSES, IMAGES, SIZE, make_bundle, reseal, weight, write_onnx

from validate import check_bundle, load_manifest, load_parity
from validate.bundle import record_files
from validate.door import InputRejected, ParityFailed, Unavailable
from validate.golden import Golden, read_golden, write_golden
from validate.schema import OnnxRecord, TensorSpec, manifest_schema, parity_schema


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


def golden_arrays(bundle: Path) -> dict[str, np.ndarray]:
    with np.load(bundle / "golden.npz") as arrays:
        return dict(arrays)


def refused(bundle: Path, code: int, *words: str) -> None:
    verdict = check_bundle(bundle)
    assert verdict.exit_code == code, verdict.checks
    for word in words:
        assert word in "; ".join(verdict.faults)


def test_a_whole_bundle_passes(good: Path) -> None:
    told: list[str] = []
    verdict = check_bundle(good, threads=1, progress=told.append)
    assert verdict.exit_code == 0
    verdict.raise_if_failed()
    assert {check.status for check in verdict.checks} == {"passed"}
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
    refused(bundle, 3, "manifest.json", "files.5.path", "plain relative path")


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
    refused(bundle, 3, "plan.json", "not a slimming plan")
    reseal(bundle, plan_digest="0" * 64)
    refused(bundle, 3, "plan.json", "plan_digest")


def test_a_build_that_failed_its_gate(bundle: Path) -> None:
    def fail(record: dict[str, Any]) -> None:
        record["rungs"][2]["status"] = "failed"

    edit(bundle / "manifest.json", fail)
    edit(bundle / "parity.json", lambda r: (fail(r), r.update(passed=False)))
    reseal(bundle)
    refused(bundle, 5, "parity.json", "onnx-slim")


def npz(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: a.pop("labels"), "must hold the arrays"),
        (lambda a: a.update(extra=np.zeros(1)), "must hold the arrays"),
        (lambda a: a.update(inputs=a["inputs"][:, :1]), "inputs: has shape"),
        (lambda a: a.update(slim_logits=a["slim_logits"][:, :2]), "slim_logits: has shape"),
        (lambda a: a.update(labels=a["labels"][:3]), "different numbers of images"),
        (lambda a: a.update(labels=a["labels"] + 90), "labels must be in"),
        (lambda a: a.update(labels=a["labels"].astype(object)), "labels: is object"),
        (lambda a: a.update(inputs=a["inputs"].astype(np.float64)), "inputs: is float64"),
        (lambda a: a.update({k: v[:0] for k, v in a.items()}), "has shape (0"),
        (lambda a: a.update(slim_logits=a["slim_logits"] * np.nan), "slim_logits holds NaN"),
    ],
)
def test_golden_arrays_that_do_not_fit(bundle: Path, change: Callable[[dict[str, Any]], Any], word: str) -> None:
    arrays = golden_arrays(bundle)
    change(arrays)
    npz(bundle / "golden.npz", arrays)
    reseal(bundle)
    refused(bundle, 3, "golden.npz", word)


def test_golden_that_is_a_pickle_or_no_zip(bundle: Path) -> None:
    for data in (b"", b"\x80\x04K\x01.", b"PK\x03\x04" + b"\0" * 50):
        (bundle / "golden.npz").write_bytes(data)
        reseal(bundle)
        refused(bundle, 3, "golden.npz")


def test_golden_that_is_a_zip_bomb(bundle: Path) -> None:
    arrays = golden_arrays(bundle)
    with zipfile.ZipFile(bundle / "golden.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            bomb = b"\0" * (50 << 20) if name == "inputs" else b""
            archive.writestr(f"{name}.npy", buffer.getvalue() + bomb)
    reseal(bundle)
    refused(bundle, 3, "golden.npz", "inputs: its data is not")
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 3, SIZE, SIZE)})
    with zipfile.ZipFile(bundle / "golden.npz", "w") as archive:
        for name in arrays:
            archive.writestr(f"{name}.npy", huge.getvalue())
    reseal(bundle)
    refused(bundle, 3, "golden.npz", "allowed")


def test_golden_comes_back_as_it_went(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    golden = Golden(
        rng.standard_normal((2, 3, 4, 5)).astype(np.float32)[:, ::-1],
        np.array([1, -1]),
        rng.standard_normal((7, 2)).astype(np.float32).T,
        rng.standard_normal((2, 7)),
    )
    write_golden(tmp_path / "golden.npz", golden)
    back = read_golden(tmp_path / "golden.npz", (3, 4, 5), 7)
    np.testing.assert_array_equal(back.inputs, golden.inputs)
    np.testing.assert_array_equal(back.original_logits, golden.original_logits)
    np.testing.assert_array_equal(back.labels, golden.labels)


@pytest.mark.parametrize("name", ["model.onnx", "model-fp16.onnx"])
@pytest.mark.parametrize(("data", "word"), [(b"", "empty or truncated"), (b"not onnx at all", "not a readable ONNX file")])
def test_a_sealed_graph_that_is_none(bundle: Path, name: str, data: bytes, word: str) -> None:
    (bundle / name).write_bytes(data)
    reseal(bundle)
    refused(bundle, 3, name, word)


def test_a_sealed_graph_that_is_truncated(bundle: Path) -> None:
    data = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(data[: len(data) - 200])
    reseal(bundle)
    refused(bundle, 3, "model.onnx")


def test_a_graph_with_another_interface(bundle: Path) -> None:
    write_onnx(bundle / "model.onnx", weight()[:, :4])
    reseal(bundle)
    refused(bundle, 3, "model.onnx")
    write_onnx(bundle / "model.onnx", weight(), batch=4)
    reseal(bundle)
    refused(bundle, 3, "model.onnx", "inputs and outputs")


def test_a_graph_of_fixed_batch_size(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "model-fp16.onnx").unlink()
    write_onnx(bundle / "model.onnx", weight(), batch=4)
    reseal(
        bundle,
        inputs=[TensorSpec(name="image", dtype="float32", shape=[4, 3, SIZE, SIZE])],
        outputs=[TensorSpec(name="logits", dtype="float32", shape=[4, CLASSES])],
        onnx=[OnnxRecord(path="model.onnx", stage="onnx-slim", max_error=0.02)],
    )
    assert IMAGES % 4
    assert check_bundle(bundle).exit_code == 0


def test_weights_outside_the_bundle(bundle: Path) -> None:
    write_onnx(bundle / "model.onnx", weight(), external="weights.bin")
    reseal(bundle)
    assert check_bundle(bundle).exit_code == 0
    shutil.copy(bundle / "weights.bin", bundle.parent / "weights.bin")
    for location in ("../weights.bin", str(bundle.parent / "weights.bin")):
        write_onnx(bundle / "model.onnx", weight(), external=location)
        reseal(bundle)
        refused(bundle, 3, "model.onnx", "outside the bundle")
    write_onnx(bundle / "model.onnx", weight(), external="elsewhere.bin")
    reseal(bundle)
    refused(bundle, 3, "model.onnx", "does not list")


def test_wrong_answers_are_exit_5(bundle: Path) -> None:
    write_onnx(bundle / "model.onnx", weight() * np.float32(1.1))
    reseal(bundle)
    refused(bundle, 5, "model.onnx", "max error")
    with pytest.raises(ParityFailed, match="max error"):
        check_bundle(bundle).raise_if_failed()


def test_disagreement_is_exit_5_within_a_loose_tolerance(bundle: Path) -> None:
    write_onnx(bundle / "model.onnx", weight(seed=2))
    records = [OnnxRecord(path="model.onnx", stage="onnx-slim", max_error=100.0), load_manifest(bundle).onnx[1]]
    reseal(bundle, onnx=records)
    refused(bundle, 5, "model.onnx", "agreement")


def test_nan_is_exit_5_of_its_own(bundle: Path) -> None:
    broken = weight()
    broken[0, 0] = np.inf
    write_onnx(bundle / "model.onnx", broken)
    reseal(bundle)
    verdict = check_bundle(bundle)
    assert verdict.exit_code == 5
    assert [check.name for check in verdict.checks if check.status == "failed"] == ["finite"]


def test_a_graph_declared_not_to_run_is_not_run(bundle: Path) -> None:
    records = [load_manifest(bundle).onnx[0], OnnxRecord(path="model-fp16.onnx", stage="onnx-slim-fp16", max_error=None)]
    reseal(bundle, onnx=records)
    verdict = check_bundle(bundle)
    assert verdict.exit_code == 0
    assert [check.subject for check in verdict.checks if check.status == "not executed"] == ["model-fp16.onnx"]


def test_a_broken_bundle_is_refused_before_it_runs(bundle: Path) -> None:
    (bundle / "model-fp16.onnx").unlink()
    verdict = check_bundle(bundle)
    assert {check.name for check in verdict.checks} == {"manifest", "files"}
    with pytest.raises(InputRejected, match=r"model-fp16\.onnx"):
        verdict.raise_if_failed()


def test_an_absent_provider_is_unavailable(good: Path) -> None:
    with pytest.raises(Unavailable, match="NoSuchProvider"):
        check_bundle(good, provider="NoSuchProvider")


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "golden.npz", "parity.json", "plan.json"])
def test_any_damage_ends_in_an_exit_code(bundle: Path, name: str) -> None:
    rng = random.Random(name)
    whole = {path.name: path.read_bytes() for path in bundle.iterdir()}
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
        for other in ("manifest.json", name):
            (bundle / other).write_bytes(whole[other])
    assert 3 in codes
    assert codes <= {0, 3, 5}  # a changed weight may still answer within the tolerance
