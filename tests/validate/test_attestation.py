"""What a device sends back, as its sender checks it: of this bundle, not easier on it, and passed there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import make_bundle, reseal, weight, write_onnx
from validate.attestation import Attestation
from validate.options import ValidateOptions
from validate.run import run

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture(scope="module")
def sent(good: Path) -> str:
    """The attestation of a device with ONNX Runtime alone."""
    return attested(good)


def attested(bundle: Path) -> str:
    """What ``validate.run --json`` prints of a bundle."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        run(ValidateOptions(bundle, engine=("ort",), threads=1, latency_seconds=0.01, json=True))
    return out.getvalue()


def check(bundle: Path, text: str, folder: Path, *, as_json: bool = False) -> int:
    path = folder / "attestation.json"
    path.write_text(text, encoding="utf-8")
    return run(ValidateOptions(bundle, attestation=path, json=as_json))


def test_a_device_that_passed(good: Path, sent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Attestation.model_validate(json.loads(sent))
    assert (record.passed, record.exit_code, record.error) == (True, 0, None)
    assert record.device.cores >= 1
    assert record.versions["onnxruntime"]
    elsewhere = Path(shutil.copytree(good, tmp_path / "the sender's copy"))
    assert check(elsewhere, sent, tmp_path) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "passed there" in told
    assert "model.onnx in ort" in told
    assert check(elsewhere, sent, tmp_path, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_the_attestation_of_another_bundle(good: Path, sent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_bundle(tmp_path / "other", name="another")
    assert check(other, sent, tmp_path) == 3
    assert "is of another bundle: its manifest.json has the SHA-256" in capsys.readouterr().err


def test_a_device_on_which_it_failed(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Path(shutil.copytree(good, tmp_path / "wrong"))
    write_onnx(wrong / "model.onnx", weight(seed=3))
    reseal(wrong)
    text = attested(wrong)
    assert json.loads(text)["error"]["code"] == 5
    assert check(wrong, text, tmp_path) == 5
    assert "the device found: " in capsys.readouterr().err


def forged(text: str, change: Change) -> str:
    record = json.loads(text)
    change(record)
    return json.dumps(record)


def easier(record: dict[str, Any]) -> None:
    for one in record["engines"]:
        one["golden"]["tolerance"] *= 2


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda r: r.update(passed=False), 3, "exit_code, passed"),
        (lambda r: r.update(exit_code=5), 3, "exit_code, passed"),
        (lambda r: r.update(unchecked=["x"]), 3, "unchecked"),
        (lambda r: r.update(schema_version=2), 3, "schema_version"),
        (lambda r: r.update(secret=1), 3, "secret"),
        (lambda r: r.pop("device"), 3, "device"),
        (lambda r: r.update(manifest=None), 3, "manifest: is not the one"),
        (lambda r: r["manifest"].update(name="other"), 3, "manifest: is not the one"),
        (lambda r: r.update(manifest_sha256="0" * 64), 3, "is of another bundle"),
        (easier, 3, "was held to"),
        (lambda r: r["engines"][0]["golden"].update(images=3), 3, "was not run on the 10 golden inputs"),
        (lambda r: r["engines"][0]["golden"].update(max_error=1.0), 3, "status"),
        (lambda r: r["engines"][0]["golden"].update(max_error=float("nan")), 3, "max_error"),
        (lambda r: r["engines"][0].update(sha256="0" * 64), 3, "no file of the bundle has its SHA-256"),
        (lambda r: r["engines"][0].update(recipe_sha256="0" * 64), 3, "was not built by the bundle's recipe"),
        (lambda r: r["engines"][0].update(file="../model.onnx"), 3, "plain relative path"),
        (lambda r: r["engines"][0]["latency"][0].update(p50_ms=-1.0), 3, "p50_ms"),
        (lambda r: r["engines"][0]["latency"][0].update(p50_ms=2.0, p90_ms=1.0), 3, "must rise"),
        (lambda r: r["engines"].clear(), 5, "no model was run in any engine"),
    ],
)
def test_what_cannot_be_of_this_bundle(
    change: Change, code: int, words: str, good: Path, sent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(good, forged(sent, change), tmp_path) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "null"])
def test_what_is_no_attestation(text: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(good, text, tmp_path) == 3
    assert "not a valid attestation" in capsys.readouterr().err
    assert run(ValidateOptions(good, attestation=tmp_path / "nowhere.json")) == 3


def test_a_bundle_that_was_changed_at_the_senders(good: Path, sent: str, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(good, tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"")
    assert check(broken, sent, tmp_path) == 3
