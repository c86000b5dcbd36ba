"""The bundle's place: what may be replaced there, and that it holds the old or the new bundle at every moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from export.publication import check_place, publish, recover
from patchslim.errors import InputRejected, UsageError
from tests.helpers.bundles import make_bundle, reseal
from tests.helpers.exports import ROOT, digests
from validate import check_bundle
from validate.bundle import load_manifest
from validate.manifest import Manifest


def filler(folder: Path, name: str) -> Callable[[Path], Manifest]:
    """A ``fill`` for ``publish``: the small bundle of the tests, called ``name``."""
    made = make_bundle(folder / name, name=name)

    def fill(part: Path) -> Manifest:
        shutil.copytree(made, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        return load_manifest(made)

    return fill


@pytest.fixture
def fills(tmp_path_factory: pytest.TempPathFactory) -> list[Callable[[Path], Manifest]]:
    folder = tmp_path_factory.mktemp("made")
    return [filler(folder, name) for name in ("first", "second")]


def test_a_bundle_is_replaced_and_nothing_is_left(fills: list[Callable[[Path], Manifest]], tmp_path: Path) -> None:
    for fill, name in zip(fills, ("first", "second"), strict=True):
        publish(fill, tmp_path / "place" / "bundle")
        assert load_manifest(tmp_path / "place" / "bundle").name == name
        assert [path.name for path in (tmp_path / "place").iterdir()] == ["bundle"]


def add(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")


def edit(bundle: Path) -> None:
    plan = json.loads((bundle / "plan.json").read_text())
    (bundle / "plan.json").write_text(json.dumps(plan | {"model": "mine"}))


def flip(bundle: Path) -> None:
    """Other bytes of the same length, with the time of change put back."""
    path = bundle / "model.onnx"
    content, before = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def forge(bundle: Path) -> None:
    """A folder of somebody's with a manifest that names their files."""
    shutil.rmtree(bundle)
    bundle.mkdir()
    (bundle / "thesis.tex").write_text("years of work")
    (bundle / "manifest.json").write_text(json.dumps({"plan_digest": "", "files": [{"path": "thesis.tex"}]}))


def link(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add, "holds notes.txt, which is not of a bundle"),
        (edit, "holds plan.json, which was changed after the bundle was made"),
        (flip, "holds model.onnx, which was changed"),
        (forge, "holds manifest.json, which is not of a bundle"),
        (link, "model.onnx: is a link"),
    ],
)
@pytest.mark.parametrize("when", ["before", "during"])
def test_what_is_not_ours_is_not_replaced(
    fills: list[Callable[[Path], Manifest]], tmp_path: Path, change: Callable[[Path], None], said: str, when: str
) -> None:
    bundle = tmp_path / "bundle"
    publish(fills[0], bundle)

    def fill(part: Path) -> Manifest:
        if when == "during":
            change(bundle)
        return fills[1](part)

    if when == "before":
        change(bundle)
        with pytest.raises(UsageError, match=said):
            check_place(bundle)
    with pytest.raises(UsageError, match=said):
        publish(fill, bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    left = digests(bundle) if change is not link else {}
    shutil.rmtree(bundle)
    publish(fills[0], bundle)
    change(bundle)
    assert left == (digests(bundle) if change is not link else {})


def test_a_bundle_that_lacks_a_file_may_be_replaced(fills: list[Callable[[Path], Manifest]], tmp_path: Path) -> None:
    publish(fills[0], tmp_path / "bundle")
    (tmp_path / "bundle" / "model.onnx").unlink()
    publish(fills[1], tmp_path / "bundle")
    assert load_manifest(tmp_path / "bundle").name == "second"


@pytest.mark.parametrize("kernel", [True, False])
def test_a_failure_keeps_the_earlier_bundle(
    fills: list[Callable[[Path], Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    if not kernel:
        monkeypatch.setattr("patchslim.folders.sys.platform", "plan9")
    publish(fills[0], tmp_path / "bundle")
    before = digests(tmp_path / "bundle")

    def fill(part: Path) -> Manifest:
        fills[1](part)
        raise OSError(28, os.strerror(28))

    with pytest.raises(UsageError, match="the disk is full"):
        publish(fill, tmp_path / "bundle")
    assert digests(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    publish(fills[1], tmp_path / "bundle")
    assert load_manifest(tmp_path / "bundle").name == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


KILLED = """
import os, signal, sys
from pathlib import Path
from patchslim.folders import temporary_folder
place = Path(sys.argv[1])
with temporary_folder(f".{place.name}.", ".part", place.parent) as box:
    (box / "new").mkdir()
    if sys.argv[2] == "between":
        place.rename(box / "old")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["filling", "between"])
def test_what_a_killed_run_left_is_put_right_at_the_next_start(
    fills: list[Callable[[Path], Manifest]], tmp_path: Path, moment: str
) -> None:
    bundle = tmp_path / "name with [brackets] and * é"
    publish(fills[0], bundle)
    done = subprocess.run([sys.executable, "-c", KILLED, str(bundle), moment], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert bundle.exists() == (moment == "filling")
    assert len([*tmp_path.iterdir()]) == (1 if moment == "between" else 2)
    recover(bundle)
    assert load_manifest(bundle).name == "first"
    assert [path.name for path in tmp_path.iterdir()] == [bundle.name]


@pytest.mark.parametrize("kernel", [True, False])
def test_several_publishers_and_a_reader(
    fills: list[Callable[[Path], Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    if not kernel:
        monkeypatch.setattr("patchslim.folders.sys.platform", "plan9")
    bundle, faults, read = tmp_path / "bundle", [], 0
    publish(fills[0], bundle)

    def publisher(fill: Callable[[Path], Manifest]) -> None:
        try:
            for _ in range(15):
                publish(fill, bundle)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=publisher, args=[fills[number % 2]]) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        try:
            assert load_manifest(bundle).name in ("first", "second")
            read += 1
        except InputRejected as error:
            if kernel:
                faults.append(error)
    assert not faults
    assert read
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("n" * 250, "the name is too long; pass one of 232 bytes or fewer"),
        ("é" * 120, "the name is too long"),
        ("/".join(["deep"] * 2000), "cannot be used"),
        (os.fsdecode(b"n\xff"), "not UTF-8"),
        (".", "needs a folder of its own"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_at_once(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_place(tmp_path / name if name != "." else Path("."))


def test_another_users_bundle_is_refused(fills: list[Callable[[Path], Manifest]], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    publish(fills[0], tmp_path / "place" / "bundle")
    for folder in [tmp_path, *tmp_path.parents][:4]:
        folder.chmod(folder.stat().st_mode | 0o755)
    (tmp_path / "place").chmod(0o777)
    code = (
        "import os, sys; from pathlib import Path\nfrom export.publication import check_place\nos.setuid(65534)\n"
        "try: check_place(Path(sys.argv[1]))\nexcept Exception as error: print(type(error).__name__, error)"
    )
    place = str(tmp_path / "place" / "bundle")
    done = subprocess.run([sys.executable, "-c", code, place], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "UsageError" in done.stdout
    assert "is another user's" in done.stdout


def test_a_bundle_that_is_exchanged_while_it_is_checked_is_no_fault(
    fills: list[Callable[[Path], Manifest]], tmp_path: Path
) -> None:
    publish(fills[0], tmp_path / "place" / "bundle")
    other = make_bundle(tmp_path / "other", name="second")
    plan = json.loads((other / "plan.json").read_text())
    (other / "plan.json").write_text(json.dumps(plan, indent=3))  # the same in other bytes
    reseal(other)
    exchanged: list[str] = []

    def fill(part: Path) -> Manifest:
        shutil.copytree(other, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        return load_manifest(other)

    def meanwhile(subject: str) -> None:
        if subject == "plan.json" and not exchanged:
            exchanged.append(subject)
            publish(fill, tmp_path / "place" / "bundle")

    verdict = check_bundle(tmp_path / "place" / "bundle", progress=meanwhile)
    assert exchanged
    assert verdict.passed, verdict.faults
    assert verdict.manifest is not None
    assert verdict.manifest.name == "second"
