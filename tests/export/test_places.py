"""Places that would spoil each other, and a user without a home, are told at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from export import export_bundle
from export.places import check_places
from patchslim.errors import Unavailable, UsageError
from tests.helpers.exports import ROOT, tiny


@pytest.mark.parametrize(
    ("work", "output", "said"),
    [
        ("one", "one", "--work .* would be part of the bundle"),
        ("one/work", "one", "--work .* would be part of the bundle"),
        ("link", "one", "--work .* would be part of the bundle"),
        ("work", "images/bundle", "--output .* lies in --data"),
        ("work", "images", "--output .* lies in --data"),
        ("images/deep/work", "bundle", "--work .* lies in --data"),
        ("work", "more/bundle", "--output .* lies in --calibration-data"),
    ],
)
def test_places_that_spoil_each_other_are_refused_at_once(tmp_path: Path, work: str, output: str, said: str) -> None:
    for name in ("images", "more"):
        (tmp_path / name / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "cat" / "1.png")
    (tmp_path / "link").symlink_to("one")
    before = sorted(tmp_path.rglob("*"))
    options = tiny(
        tmp_path / work, output=tmp_path / output, data=str(tmp_path / "images"), calibration_data=str(tmp_path / "more")
    )
    with pytest.raises(UsageError, match=said):
        check_places(options)
    with pytest.raises(UsageError, match=said):
        export_bundle(options)
    assert sorted(tmp_path.rglob("*")) == before


def test_places_beside_each_other_are_fine(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    check_places(tiny(tmp_path / "work", data=str(tmp_path / "images")))
    check_places(tiny(tmp_path / "work", data="digits", output=tmp_path / "work" / "bundle"))
    check_places(tiny(tmp_path / "work", data="hfds/someone/images"))


def as_another_user(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as a user whom no passwd names, without a home."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    for place in [folder, *folder.parents][:4]:
        place.chmod(place.stat().st_mode | 0o755)
    first = "import os, sys; from pathlib import Path\nimport export.options; from export.cache import StageCache\n"
    first += "os.setuid(54321)\n"
    given = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME", "PATCHSLIM_WORK")}
    arguments = [sys.executable, "-c", first + code, str(folder)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=given)


def test_a_work_folder_that_may_not_be_entered_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o700)
    (tmp_path / "shut" / "work").mkdir()
    for name in ("shut", "shut/work"):
        done = as_another_user(
            f"try: StageCache(Path(sys.argv[1]) / {name!r}).check()\n"
            "except Exception as error: print(type(error).__name__, error.exit_code, error)",
            tmp_path,
        )
        assert done.stdout.startswith(f"{Unavailable.__name__} 4"), done.stderr
        assert "pass --work DIR" in done.stdout


def test_a_user_without_a_home_needs_one_variable_only(tmp_path: Path) -> None:
    code = (
        "try: print(export.options.ExportOptions().work_folder)\n"
        "except Exception as error: print(error)\n"
        "os.environ['PATCHSLIM_WORK'] = sys.argv[1]\nprint(export.options.ExportOptions().work_folder)"
    )
    done = as_another_user(code, tmp_path)
    assert done.stdout.splitlines() == ["this user has no home directory to keep stages in: pass --work FOLDER", str(tmp_path)]
