"""Every hostile bundle of the corpus at the door: the exit code and words that it must end with, and nothing else happens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.attacks import (  # noqa: F401 - register theirs
    bundle_arrays,
    bundle_files,
    bundle_graphs,
    bundle_recipes,
    bundle_records,
    bundle_serving,
)
from tests.helpers.attacks.bundles import BUNDLE_ATTACKS, BundleAttack
from tests.helpers.bundles import make_bundle
from validate.run import ValidateOptions, run


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("good") / "bundle")


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of everything under ``folder``."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            status = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in BUNDLE_ATTACKS],
)
def test_it_ends_as_it_must(case: BundleAttack, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Path(shutil.copytree(good, tmp_path / "bundle"))
    case.damage(bundle)
    before = state(tmp_path)
    code = run(ValidateOptions(bundle, threads=1, engine=("ort",), latency_seconds=0, timeout=case.timeout))
    told = capsys.readouterr()
    assert code == case.code, told.err or told.out
    for word in case.words:
        assert word in told.err
    assert bool(told.err) == bool(code)
    control = {character for character in told.out + told.err if not character.isprintable()} - {"\n"}
    assert not control
    assert state(tmp_path) == before


def test_no_attack_is_there_twice() -> None:
    names = [case.name for case in BUNDLE_ATTACKS]
    assert len(set(names)) == len(names)
    assert len(names) > 200
