"""Stages in the work folder that were damaged, and what killed runs left there: made anew and said, swept, never published."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export import export_bundle
from export.cache import DIGESTS, FactStore, StageCache, StageDamaged
from tests.helpers.exports import ROOT, digests, tiny

if TYPE_CHECKING:
    from export.pipeline import Outcome


def made(root: Path, said: list[str]) -> tuple[StageCache, Path]:
    """A cache with one stage of two files."""
    cache = StageCache(root, said.append)
    folder = cache.path("plan", seed=1)
    cache.make(folder, fill)
    return cache, folder


def fill(part: Path) -> None:
    (part / "plan.json").write_text('{"a": 1}')
    (part / "weights").write_bytes(bytes(1000))


def cut(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(999))


def flip(folder: Path) -> None:
    path, before = folder / "weights", (folder / "weights").stat()
    path.write_bytes(bytes(999) + b"\1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(folder: Path) -> None:
    (folder / "weights").unlink()


def add(folder: Path) -> None:
    (folder / "more").touch()


def forget(folder: Path) -> None:
    (folder / DIGESTS).unlink()


def scribble(folder: Path) -> None:
    (folder / DIGESTS).write_text("[1")


def nest(folder: Path) -> None:
    (folder / DIGESTS).write_text("[" * 100_000)


def swell(folder: Path) -> None:
    (folder / DIGESTS).write_text((folder / DIGESTS).read_text() + " " * (2 << 20))


@pytest.mark.parametrize("damage", [cut, flip, remove, add, forget, scribble, nest, swell])
def test_a_damaged_stage_is_made_anew_and_that_is_said(tmp_path: Path, damage: object) -> None:
    said: list[str] = []
    _, folder = made(tmp_path / "work", said)
    before = digests(folder)
    assert callable(damage)
    damage(folder)
    cache = StageCache(tmp_path / "work", said.append)
    assert not cache.whole(folder)
    assert said == []
    assert cache.make(folder, fill)
    assert len(said) == 1
    assert said[0].endswith("it is made anew")
    assert digests(folder) == before
    assert not cache.make(folder, fill)
    assert [path.name for path in (tmp_path / "work").iterdir() if path.name != "facts"] == [folder.name]


def test_a_file_is_compared_with_its_digest_when_it_is_used(tmp_path: Path) -> None:
    cache, folder = made(tmp_path / "work", [])
    assert cache.read(folder / "weights") == bytes(1000)
    assert cache.verified(folder / "weights") == folder / "weights"
    assert cache.verified(tmp_path / "of the user") == tmp_path / "of the user"
    flip(folder)
    with pytest.raises(StageDamaged):
        cache.read(folder / "weights")
    with pytest.raises(StageDamaged):
        cache.verified(folder / "weights")


@pytest.mark.parametrize("stage", ["dense", "slim", "logits", "engine", "picture", "plan"])
def test_a_flipped_bit_is_never_published(
    ort_export: Outcome, export_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    work = tmp_path / "work"
    shutil.copytree(export_work, work)
    for folder in work.glob(f"{stage}-*"):
        if folder.is_dir() and not folder.name.endswith(".checkpoint"):
            path = max((each for each in folder.iterdir() if each.name != DIGESTS), key=lambda each: each.stat().st_size)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    outcome = export_bundle(tiny(work, ort_export.bundle.name))
    assert "was changed or cut off; it is made anew" in capsys.readouterr().err
    assert digests(outcome.bundle) == digests(ort_export.bundle)


@pytest.mark.parametrize(("stage", "name"), [("slim", "model.onnx"), ("logits", "logits.npy"), ("plan", "plan.json")])
def test_what_rots_on_the_disk_is_noticed_where_it_is_used(
    ort_export: Outcome, export_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, name: str
) -> None:
    work = tmp_path / "work"
    shutil.copytree(export_work, work)
    facts = FactStore(work / "facts")
    for path in work.glob(f"{stage}-*/{name}"):  # other bytes, of which a fact says that they are the old ones
        known = hashlib.sha256(path.read_bytes()).hexdigest()
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        fact = facts.path("digest", facts.states([path]))
        fact.write_text(json.dumps({"value": known, "sha256": hashlib.sha256(json.dumps(known).encode()).hexdigest()}))
    outcome = export_bundle(tiny(work, ort_export.bundle.name))
    assert "was changed on its disk; it is made anew" in capsys.readouterr().err
    assert digests(outcome.bundle) == digests(ort_export.bundle)


def test_a_damaged_fact_is_found_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.cache.SETTLED_NS", -(10**12))
    (tmp_path / "a.txt").write_text("a")
    facts = FactStore(tmp_path / "facts")
    assert facts.recall("size", lambda: 10, files=[tmp_path / "a.txt"]) == 10
    facts.save()
    (path,) = (tmp_path / "facts").iterdir()
    path.write_text(path.read_text().replace('"value": 10', '"value": 11'))
    assert FactStore(tmp_path / "facts").recall("size", lambda: 10, files=[tmp_path / "a.txt"]) == 10


def test_another_batch_size_leaves_no_trace(ort_export: Outcome, export_work: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(export_work, work)
    for folder in work.glob("logits-*"):
        shutil.rmtree(folder)
    export_bundle(tiny(work, "three", batch_size=3))
    outcome = export_bundle(tiny(work, ort_export.bundle.name))
    assert digests(outcome.bundle) == digests(ort_export.bundle)


KILLED = """
import os, signal, sys
from pathlib import Path
from export.cache import StageCache
cache = StageCache(Path(sys.argv[1]))
cache.make(cache.path("plan", seed=1), lambda part: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_what_killed_runs_left_is_swept(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, str(work)], cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
        assert len([*work.iterdir()]) == 1  # the second sweeps what the first left
    (work / ".mine").mkdir()
    _, folder = made(work, [])
    assert sorted(path.name for path in work.iterdir()) == [".mine", folder.name]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes fail in the same place, with the same kind of error."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from export.cache import StageCache; from patchslim.errors import UsageError; import numpy as np\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "cache = StageCache(Path(sys.argv[1]))\n"
        "try: cache.make(cache.path('logits'), lambda part: (part / 'a').write_bytes(bytes(10000)))\n"
        "except UsageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "work")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the work folder's disk is full; free some space or pass --work DIR" in done.stdout
    assert not [*(tmp_path / "work").iterdir()]
