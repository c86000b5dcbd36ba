"""The bill of materials: every distribution here, valid CycloneDX, the same bytes from the same environment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from export.sbom import render
from patchslim.packages import installed_version
from tests.helpers.bundles import make_bundle, reseal
from validate import check_bundle

if TYPE_CHECKING:
    from export.pipeline import Outcome

ZEROS = "0" * 64


@pytest.fixture(scope="module")
def text() -> str:
    return render("vit", ZEROS)


def test_it_is_valid_cyclonedx_and_names_what_is_installed(text: str) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    record = json.loads(text)
    found = {one["name"].lower(): one for one in record["components"]}
    for name in ("torch", "onnx", "numpy", "timm"):
        assert found[name]["version"] == installed_version(name)
        assert found[name]["purl"] == f"pkg:pypi/{name}@{installed_version(name)}"
        assert found[name]["licenses"]
    requires = {one["ref"]: one.get("dependsOn", []) for one in record["dependencies"]}
    assert f"numpy=={installed_version('numpy')}" in requires[f"onnx=={installed_version('onnx')}"]
    assert set(requires["model"]) == {one["bom-ref"] for one in record["components"]}
    model = record["metadata"]["component"]
    assert (model["type"], model["name"], model["hashes"][0]["content"]) == ("machine-learning-model", "vit", ZEROS)


def test_the_same_environment_gives_the_same_bytes(text: str) -> None:
    assert render("vit", ZEROS) == text
    assert "timestamp" not in json.loads(text)["metadata"]
    other = render("vit", "1" * 64)
    assert json.loads(other)["serialNumber"] != json.loads(text)["serialNumber"]


def test_a_bundle_has_it_and_it_agrees_with_the_manifest(ort_export: Outcome) -> None:
    assert (ort_export.bundle / "sbom.cdx.json").is_file()
    found = next(check for check in check_bundle(ort_export.bundle).checks if check.name == "bill of materials")
    assert (found.status, found.subject) == ("passed", "sbom.cdx.json")


def lacking(record: dict[str, Any]) -> None:
    record["components"] = [one for one in record["components"] if one["name"].lower() != "onnx"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lacking, "lacks onnx"),
        (lambda r: r.update(bomFormat="SPDX"), "bomFormat"),
        (lambda r: r.pop("components"), "components"),
        (lambda r: r["components"].append({"version": "1"}), "name"),
        (lambda r: r["components"].append({"name": 1}), "name"),
    ],
)
def test_one_that_says_something_else_is_refused(
    change: Callable[[dict[str, Any]], Any], words: str, text: str, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "sbom.cdx.json").write_text(text)
    reseal(bundle)
    assert check_bundle(Path(shutil.copytree(bundle, tmp_path / "right"))).passed
    record = json.loads(text)
    change(record)
    (bundle / "sbom.cdx.json").write_text(json.dumps(record))
    reseal(bundle)
    verdict = check_bundle(bundle)
    assert (verdict.exit_code, words in verdict.faults[0]) == (3, True), verdict.faults
