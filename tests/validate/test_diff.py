"""Two bundles in words: nothing where they are equal, every topic where they are not, and no trust in either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from patchslim.errors import InputRejected
from tests.helpers.bundles import make_bundle, plan, reseal
from validate.bundle import load_manifest
from validate.bundle_differences import compare_bundles
from validate.diff import DiffOptions, run
from validate.manifest import Manifest, Weights


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture
def other(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "other"))


def said(first: Path, second: Path) -> str:
    found = compare_bundles(first, second)
    return "\n".join(f"{one.topic}: {one.said}" for one in found.differences)


def test_equal_bundles(good: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(DiffOptions(good, other)) == 0
    assert "the bundles are equal, file by file" in capsys.readouterr().out
    assert run(DiffOptions(good, good, json=True)) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["equal"], record["exit_code"], record["differences"], record["same_files"]) == (True, 0, [], True)


def test_another_plan(good: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = plan().model_copy(update={"kept": [[0, 1, 3, 4], [0, 3], [0]]})
    changed.save(other / "plan.json")
    macs = load_manifest(other).macs.model_copy(
        update={"slim": changed.macs(), "reduction": 1 - changed.macs() / changed.dense_macs()}
    )
    parity = json.loads((other / "parity.json").read_text())
    parity["macs"] = macs.model_dump(mode="json")
    (other / "parity.json").write_text(json.dumps(parity))
    reseal(other, tokens_per_block=changed.counts, macs=macs)
    told = said(good, other)
    assert "plan: tokens per block: 5, 3, 1 -> 4, 2, 1" in told
    assert "cost: 5.956e-06 -> " in told
    assert "files: other bytes: plan.json" in told
    assert "model: " not in told
    assert run(DiffOptions(good, other, json=True)) == 5
    record = json.loads(capsys.readouterr().out)
    assert {one["topic"] for one in record["differences"]} == {"plan", "cost", "files"}
    assert run(DiffOptions(good, other)) == 5
    assert "tokens per block" in capsys.readouterr().out


def test_what_the_manifest_says(good: Path, other: Path) -> None:
    before = load_manifest(good)
    rungs = [
        rung.model_copy(update={"max_error": 2e-4, "tolerance": 2e-4, "status": "passed"})
        if rung.stage == "onnx-slim"
        else rung
        for rung in before.rungs
    ]
    engine = before.engine.model_copy(update={"version": "2"})
    for name in ("parity.json", "manifest.json"):
        record = json.loads((other / name).read_text())
        record["rungs"] = [rung.model_dump(mode="json") for rung in rungs]
        record["engine"]["version"] = "2"
        (other / name).write_text(json.dumps(record))
    (other / "notes.txt").write_text("new")
    reseal(
        other,
        rungs=rungs,
        engine=engine,
        name="small",
        tools={"onnx": "2", "torch": "3"},
        labels=["first", *before.labels[1:]],
        weights=before.weights.model_copy(update={"sha256": "1" * 64}),
    )
    told = said(good, other)
    for line in (
        "model: name of the bundle: tiny -> small",
        "model: other weights: random (no digest) -> random (SHA-256 111111111111...)",
        "accuracy: onnx-slim: top-1 100.00 %, drop 0.00 (95 % CI -16.33 to 16.33), logits off by 1e-05 at most -> ",
        "engine: backend: onnxruntime 1 -> onnxruntime 2",
        "tools: torch: not there -> 3",
        "interface: labels: 6 -> 6, 1 of the same place named otherwise",
        "files: only in the second: notes.txt (3 bytes)",
        "files: other bytes: parity.json",
    ):
        assert line in told
    assert "files: only in the first: notes.txt (3 bytes)" in said(other, good)


#: A change of each field of a manifest that its own rules allow, made in the record alone.
CHANGES: dict[str, Any] = {
    "name": "other",
    "model_args": {"depth": 3},
    "tools": {"onnx": "0"},
    "target": {"engine": "trt"},
    "labels": [],
    "precision": "fp16",
    "weights": Weights(source="random", license="MIT"),
    "golden_images": [],
}


@pytest.mark.parametrize("field", CHANGES)
def test_no_difference_of_the_manifests_goes_unsaid(field: str, good: Path, other: Path) -> None:
    assert field in Manifest.model_fields
    (other / "recipe.json").unlink(missing_ok=True)
    (good_without := other.with_name("good")).mkdir()
    shutil.copytree(good, good_without, dirs_exist_ok=True)
    (good_without / "recipe.json").unlink()
    reseal(good_without)
    reseal(other, **{field: CHANGES[field]})
    assert said(good_without, other) != ""


def test_a_bundle_that_is_broken(good: Path, other: Path) -> None:
    (other / "model.onnx").write_bytes(b"")
    for pair in ((good, other), (other, good)):
        with pytest.raises(InputRejected, match=r"model\.onnx: has 0 bytes"):
            run(DiffOptions(*pair))
    with pytest.raises(InputRejected, match="is not a folder"):
        run(DiffOptions(good, other / "nowhere"))
