"""A report is believed in nothing that can be derived: verdicts, counts, intervals, what golden.npz shows, what is granted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.bundles import make_bundle, refused, reseal
from validate import check_bundle, load_manifest
from validate.explain import what_it_proves
from validate.golden import read_golden, write_golden
from validate.manifest import EngineRecord, OnnxRecord
from validate.parity import drop_interval, images_needed, proportion_interval, rung

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def forge(folder: Path, change: Change) -> None:
    """Change the figures in both records and seal them, as one who can write the folder would."""
    for name in ("parity.json", "manifest.json"):
        record = json.loads((folder / name).read_text())
        change(record)
        (folder / name).write_text(json.dumps(record))
    reseal(folder)


def slim(**fields: Any) -> Change:
    return lambda record: record["rungs"][1].update(fields)


def lossy(record: dict[str, Any]) -> None:
    """All figures say that one image of ten was lost, and the status that this passed the gate of 0.2 points."""
    fields = {"lost": 1, "top1": 90.0, "top1_drop": 10.0, "agreeing": 9, "agreement": 90.0, "drop_interval": None}
    record["rungs"][1].update(fields)


def test_figures_that_fail_their_own_gate_are_exit_5_whatever_the_status(bundle: Path) -> None:
    forge(bundle, lossy)
    assert json.loads((bundle / "parity.json").read_text())["passed"]
    refused(bundle, 5, "the build did not pass its gate of 0.2 points: pytorch-slim")


@pytest.mark.parametrize("fields", [{"non_finite": 3}, {"max_error": 0.5}, {"max_error": None, "mean_error": None}])
def test_numerical_figures_that_fail_are_exit_5(bundle: Path, fields: dict[str, Any]) -> None:
    forge(bundle, lambda record: record["rungs"][2].update(fields))
    refused(bundle, 5, "did not pass its gate of 0.2 points: onnx-slim")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (slim(drop_interval=[-0.1, 0.1]), "drop_interval: [-0.1, 0.1] is not [-16."),
        (slim(top1=90.0), "do not lead from top1 100.0 to 90.0"),
        (slim(top1=99.0), "99.0 % is no whole number of 10 images"),
        (slim(top5=90.0), "top1: 100.0 is more than top5, 90.0"),
        (slim(lost=1, gained=1), "agreeing, lost, gained: 10 + 1 + 1 are more than 10"),
        (slim(lost=None, gained=None, top1_drop=None, drop_interval=None), "lacks lost and gained"),
        (slim(agreeing=None, agreement=None), "lacks agreeing"),
        (slim(compared_to="engine"), "'engine' is no earlier stage"),
        (slim(status="not executed"), "its status is 'not executed', and by its figures 'passed'"),
        (lambda record: record["rungs"][2].update(tolerance=None), "lacks a tolerance"),
        (lambda record: record["rungs"][2].update(tolerance=1e30), "tolerance: 1e+30 is more than an export allows"),
        (lambda record: record["evaluation"].update(images=2000), "10 images, and evaluation names 2000"),
        (slim(max_error=1e-9), "max_error: 1e-09, and golden.npz alone shows 1e-05"),
        (
            lambda record: record["rungs"][1].update(agreeing=9, agreement=90.0),
            "agreeing: 9 of 10 images, and golden.npz alone",
        ),
    ],
)
def test_figures_that_cannot_be(bundle: Path, change: Change, word: str) -> None:
    forge(bundle, change)
    refused(bundle, 3, word)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_error": 1e30}, "max_error: 1e+30 is more than an export allows"),
        ({"max_error": 0.05}, "max_error: 0.05 is more than an export allows"),
        ({"min_agreement": 0.0}, "min_agreement: 0 is less than an export asks for, 100"),
    ],
)
def test_what_a_manifest_may_not_grant_itself(bundle: Path, fields: dict[str, float], word: str) -> None:
    first, second = load_manifest(bundle).onnx
    reseal(bundle, onnx=[OnnxRecord.model_validate(first.model_dump() | fields), second])
    refused(bundle, 3, word)


def test_what_fp16_may_be_granted(bundle: Path) -> None:
    first, second = load_manifest(bundle).onnx
    reseal(bundle, onnx=[first, second.model_copy(update={"max_error": 0.1, "min_agreement": 90.0})])  # as until now
    assert check_bundle(bundle).passed
    reseal(bundle, onnx=[first, second.model_copy(update={"max_error": 0.3})])
    refused(bundle, 3, "model-fp16.onnx: max_error: 0.3 is more")
    reseal(bundle, onnx=[first, second.model_copy(update={"min_agreement": 89.0})])
    refused(bundle, 3, "model-fp16.onnx: min_agreement: 89 is less")


def test_golden_logits_decide_over_the_figures(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    golden = read_golden(bundle / "golden.npz", manifest.preprocessing.input_size, manifest.classes)
    turned = golden.slim_logits.copy()
    turned[0] = np.roll(turned[0], 1)
    write_golden(bundle / "golden.npz", type(golden)(golden.inputs, golden.labels, golden.original_logits, turned))
    reseal(bundle)
    refused(bundle, 3, "parity.json: rungs: pytorch-slim: agreeing: 10 of 10 images, and golden.npz alone shows 9 of 10")


RTX = b"vtrt\0\0\0\0\2\0\0\0\0\0\0\0"


@pytest.mark.parametrize(
    ("backend", "data", "fault"),
    [
        ("tensorrt-rtx", RTX + (40).to_bytes(8, "little") + bytes(16), ""),
        ("tensorrt", b"ftrt" + bytes(36), ""),
        ("tensorrt-rtx", b"", "is empty"),
        ("tensorrt-rtx", b"ftrt" + bytes(36), "no engine of tensorrt-rtx"),
        ("tensorrt", b"\x7fELF" + bytes(36), "no engine of tensorrt"),
        ("tensorrt", b"ftrt", "no engine of tensorrt"),
        ("tensorrt-rtx", RTX + (80).to_bytes(8, "little") + bytes(16), "has 40 bytes, and its header says 80"),
        ("openvino", b"", "is empty"),
        ("openvino", b"anything", ""),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_engine_files_are_engines(bundle: Path, backend: str, data: bytes, fault: str) -> None:
    (bundle / "engine").mkdir()
    (bundle / "engine" / "a.engine").write_bytes(data)
    engine = EngineRecord(
        backend=backend, version="1", targets=["sm80"], precision="fp16", files=["engine/a.engine"], status="not executed"
    )
    record = json.loads((bundle / "parity.json").read_text())
    (bundle / "parity.json").write_text(json.dumps(record | {"engine": engine.model_dump(mode="json")}))
    reseal(bundle, engine=engine)
    if fault:
        refused(bundle, 3, "a.engine", fault)
    else:
        assert check_bundle(bundle).passed


@pytest.mark.parametrize("name", ["HIDDEN.ONNX", "deep/er/b.Onnx"])
def test_every_onnx_file_is_recorded(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes((bundle / "model.onnx").read_bytes())
    with pytest.raises(ValueError, match=f"onnx: lacks {name}"):
        reseal(bundle)


def test_declared_sizes_are_compared_before_anything_is_hashed(bundle: Path) -> None:
    with (bundle / "kept_patches.png").open("wb"):
        os.truncate(bundle / "kept_patches.png", 1 << 43)  # sparse: no bytes on the disk, hours to hash
    record = json.loads((bundle / "manifest.json").read_text())
    for size, word in ((1000, "truncated or replaced"), (1 << 43, "allowed")):
        extra = {"path": "kept_patches.png", "size": size, "sha256": "0" * 64}
        (bundle / "manifest.json").write_text(json.dumps(record | {"files": [*record["files"], extra]}))
        refused(bundle, 3, word)


def test_a_manifest_of_more_than_8_mib(bundle: Path) -> None:
    with (bundle / "manifest.json").open("a") as file:
        file.write(" " * (8 << 20))
    refused(bundle, 3, "manifest.json: not a valid manifest: has more than the 8388608 bytes allowed")


def test_a_manifest_that_is_a_pipe(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    refused(bundle, 3, "manifest.json: is not a regular file")


def test_numbers_that_no_float_holds(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace('"agreeing": 10', '"agreeing": 1' + "0" * 400))
    refused(bundle, 3, "agreeing")


def test_how_many_images_a_gate_needs() -> None:
    for lost, gained, images, points in ((0, 0, 800, 0.2), (10, 4, 800, 0.5), (1, 0, 50, 1.0)):
        needed = images_needed(lost, gained, images, points)
        assert needed is not None
        scale = needed / images
        low, high = drop_interval(round(lost * scale), round(gained * scale), needed)
        centre = (low + high) / 2
        assert 0.8 * points < high - centre < 1.05 * points
    for points in (0.0, 1e-300, 5e-324):
        assert images_needed(0, 0, 10, points) is None


def test_the_interval_of_a_proportion_is_scipys() -> None:
    from scipy.stats import binomtest

    for count, images in ((0, 10), (8, 10), (10, 10), (451, 2000)):
        expected = binomtest(count, images).proportion_ci(method="wilson")
        found = proportion_interval(count, images)
        assert found == pytest.approx((100 * expected.low, 100 * expected.high))


def test_what_a_verdict_rests_on() -> None:
    logits = np.eye(4, dtype=np.float32)[np.arange(8) % 4]
    turned = np.roll(logits, 1, axis=1)
    targets = np.arange(8) % 4
    many = np.arange(2000) % 4
    original = rung("pytorch", logits, targets)
    one = rung("pytorch-slim", logits[:1], targets[:1], logits[:1])
    assert (
        "one image of 1 is 100 points and decides this gate alone: it proves nothing" in what_it_proves([original, one], 0.2)[1]
    )
    whole = np.eye(4, dtype=np.float32)[many]
    said = what_it_proves([rung("pytorch", whole, many), rung("pytorch-slim", whole, many, whole)], 0.2)
    assert said == ["gate: at most 0.2 points of top-1 lost; pytorch-slim lost 0.00 on 2000 images, 95 % CI -0.10 to 0.10"]
    said = what_it_proves([rung("pytorch", whole[:800], many[:800]), rung("a", whole[:800], many[:800], whole[:800])], 0.2)
    assert said[1] == "800 images cannot tell this from a drop above the gate; about 980 could"
    unlabelled = rung("pytorch-slim", turned, None, logits)
    assert "pytorch-slim lost 100.00 on 8 images" in what_it_proves([original, unlabelled], 0.0)[0]
    assert "no number of images resolves 0 points" in what_it_proves([original, unlabelled], 0.0)[1]
    assert what_it_proves([original], 0.2)[0].endswith("no stage after the original was run")
