"""What is handed to pip: wheels without tests, benchmarks, training code or weights, and metadata that tells what it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("export", "graph_passes", "patchslim", "slimming", "validate")
#: What uv says when no package index answers; anything else that it says is a failure of ours.
UNREACHABLE = ("dns error", "error sending request", "failed to fetch", "connection refused", "timed out", "network")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, zipfile.ZipFile]:
    """The wheels of the workspace, by distribution."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on PATH")
    folder = tmp_path_factory.mktemp("wheels")
    command = [uv, "build", "--all-packages", "--wheel", "--python", sys.executable, "--out-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    if done.returncode and any(word in done.stderr.lower() for word in UNREACHABLE):
        pytest.skip(f"the build's packages cannot be fetched from here: {' '.join(done.stderr.split())[:300]}")
    assert done.returncode == 0, done.stderr
    return {path.name.partition("-")[0]: zipfile.ZipFile(path) for path in folder.glob("*.whl")}


def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_the_packages_and_nothing_else(wheels: dict[str, zipfile.ZipFile]) -> None:
    assert set(wheels) == {"patchslim", "patchslim_digits"}
    names = wheels["patchslim"].namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    ours = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert {Path(name).suffix for name in ours} <= {".py", ".typed", ".css", ".html", ".jinja", ".txt"}
    assert not [name for name in names if "train_" in name or "test" in Path(name).parts]
    assert sum(info.compress_size for info in wheels["patchslim"].infolist()) < 1e6


def test_every_package_is_typed(wheels: dict[str, zipfile.ZipFile]) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheels["patchslim"].namelist())


def test_the_weights_are_a_distribution_of_their_own(wheels: dict[str, zipfile.ZipFile]) -> None:
    names = wheels["patchslim_digits"].namelist()
    assert {"patchslim_digits/vit_ti_digits.safetensors", "patchslim_digits/vit_ti_digits.json"} <= set(names)
    required = metadata(wheels["patchslim"]).get_all("Requires-Dist", [])
    assert [one.partition(";")[2].strip() for one in required if one.startswith("patchslim-digits")] == ["extra == 'export'"]


def test_the_metadata_tells_what_it_is(wheels: dict[str, zipfile.ZipFile]) -> None:
    told = metadata(wheels["patchslim"])
    assert {url.partition(",")[0] for url in told.get_all("Project-URL", [])} == {
        "Homepage",
        "Documentation",
        "Source",
        "Changelog",
        "Issues",
    }
    assert "Typing :: Typed" in told.get_all("Classifier", [])
    assert told["License-Expression"] == "Apache-2.0"
    assert "vision transformer" in told["Keywords"]
    text = told.get_payload()
    assert isinstance(text, str)
    assert text.lstrip().startswith("# patchslim")
    assert "\n# Changelog\n" in text
    assert "](docs/" not in text
    assert "](https://github.com/patchslim/patchslim/blob/main/LICENSE)" in text


def test_the_console_command_is_an_entry_point(wheels: dict[str, zipfile.ZipFile]) -> None:
    wheel = wheels["patchslim"]
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert wheel.read(name).decode().split() == ["[console_scripts]", "patchslim", "=", "export.console:main"]
