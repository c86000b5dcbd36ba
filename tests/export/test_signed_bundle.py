"""A bundle that its maker signs, and what whoever has the public key knows of it then."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export import export_bundle
from export.options import ExportOptions
from export.publication import publish
from patchslim.errors import UsageError
from tests.helpers.bundles import make_bundle, reseal
from tests.helpers.exports import tiny
from tests.helpers.signing_keys import write_keys
from validate import check_bundle, load_manifest
from validate.options import ValidateOptions
from validate.run import run

if TYPE_CHECKING:
    from export.pipeline import Outcome

pytest.importorskip("model_signing")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path)


@pytest.fixture
def signed(keys: tuple[Path, Path], tmp_path: Path) -> Path:
    """The small bundle of the tests, published with a signature."""
    made = make_bundle(tmp_path / "made")

    def fill(new: Path) -> object:
        shutil.copytree(made, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json", "SHA256SUMS"))
        return load_manifest(made)

    publish(fill, tmp_path / "bundle", keys[0])  # type: ignore[arg-type]
    return tmp_path / "bundle"


def options(bundle: Path, key: Path | None = None) -> ValidateOptions:
    return ValidateOptions(bundle, public_key=key, engine=("ort",), threads=1, latency_seconds=0)


def test_the_owner_of_the_key_made_it(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(options(signed, keys[1])) == 0
    assert "every file, by the owner of key.pub.pem" in capsys.readouterr().out
    assert run(options(signed)) == 0
    assert "not checked: needs the signer's public key" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "stranger").mkdir()
    _, stranger = write_keys(tmp_path / "stranger")
    assert run(options(signed, stranger)) == 3
    assert "model.sig: is not a signature of this folder by key.pub.pem" in capsys.readouterr().err


def test_who_can_write_the_folder_cannot_sign_it(signed: Path, keys: tuple[Path, Path]) -> None:
    """A manifest made anew over other files is valid by itself."""
    manifest = load_manifest(signed)
    reseal(signed, name="another")
    assert check_bundle(signed, threads=1).passed
    assert manifest.name != load_manifest(signed).name
    verdict = check_bundle(signed, threads=1, public_key=keys[1])
    assert (verdict.exit_code, "is not a signature of this folder" in verdict.faults[0]) == (3, True)
    (signed / "model.sig").unlink()
    verdict = check_bundle(signed, threads=1, public_key=keys[1])
    assert (verdict.exit_code, "is not signed, and a public key was given" in verdict.faults[0]) == (3, True)


def test_a_signed_bundle_is_replaced_by_a_later_one(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    later = make_bundle(tmp_path / "later", name="later")

    def fill(new: Path) -> object:
        shutil.copytree(later, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json", "SHA256SUMS"))
        return load_manifest(later)

    publish(fill, signed)  # type: ignore[arg-type]
    assert load_manifest(signed).name == "later"
    assert not (signed / "model.sig").exists()


def test_a_key_that_cannot_sign_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(UsageError, match=r"--sign .*key\.pem: is not a private key"):
        export_bundle(ExportOptions(sign=tmp_path / "key.pem", output=tmp_path / "bundle", work=tmp_path / "work"))
    assert [path.name for path in tmp_path.iterdir()] == ["key.pem"]


def test_an_export_signs_its_bundle(ort_export: Outcome, export_work: Path, keys: tuple[Path, Path]) -> None:
    outcome = export_bundle(tiny(export_work, "tiny-signed", sign=keys[0]))
    assert run(options(outcome.bundle, keys[1])) == 0
    with_sums = (outcome.bundle / "SHA256SUMS").read_text()
    assert "model.sig" not in with_sums
