"""Doing it again: finished stages are reused, the bundle is the same to the byte, and an interrupted run continues."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export import export_bundle
from export.cache import StageCache
from patchslim.errors import Unavailable
from tests.helpers.exports import ROOT, command, digests, read, stages_in, tiny
from validate import check_bundle

if TYPE_CHECKING:
    from export.pipeline import Outcome


@pytest.mark.parametrize("engine", ["ort", "trt"])
def test_a_second_run_makes_no_stage_again(request: pytest.FixtureRequest, export_work: Path, engine: str) -> None:
    outcome: Outcome = request.getfixturevalue(f"{engine}_export")
    stages, files = stages_in(export_work), digests(outcome.bundle)
    target = ("sm89",) if engine == "trt" else ()
    again = export_bundle(tiny(export_work, outcome.bundle.name, engine=engine, target=target))  # type: ignore[arg-type]
    assert stages_in(export_work) == stages
    assert digests(again.bundle) == files
    assert again.parity == outcome.parity


def test_an_empty_work_folder_gives_the_same_bytes(ort_export: Outcome, tmp_path: Path) -> None:
    outcome = export_bundle(tiny(tmp_path / "work", ort_export.bundle.name))
    assert digests(outcome.bundle) == digests(ort_export.bundle)
    kinds = {name.partition("-")[0] for name in stages_in(tmp_path / "work")}
    assert kinds == {"plan", "dense", "slim", "engine", "logits"}


def test_only_what_a_choice_changes_is_made_again(ort_export: Outcome, export_work: Path) -> None:
    before = set(stages_in(export_work))
    export_bundle(tiny(export_work, "images", eval_images=36))
    made = {name.partition("-")[0] for name in set(stages_in(export_work)) - before}
    assert made == {"logits"}
    before = set(stages_in(export_work))
    export_bundle(tiny(export_work, "budget", macs_reduction=0.2))
    made = {name.partition("-")[0] for name in set(stages_in(export_work)) - before}
    assert made == {
        "plan",
        "dense",
        "slim",
        "engine",
        "logits",
    }  # the weights are fitted to the plan, so the dense graph is too
    before = set(stages_in(export_work))
    export_bundle(tiny(export_work, "budget", macs_reduction=0.2, fit="none", seed=77))  # a model that no other test uses
    made = {name.partition("-")[0] for name in set(stages_in(export_work)) - before}
    assert made == {"plan", "dense", "slim", "engine", "logits"}
    before = set(stages_in(export_work))
    export_bundle(tiny(export_work, "budget", macs_reduction=0.3, fit="none", seed=77))
    made = {name.partition("-")[0] for name in set(stages_in(export_work)) - before}
    assert made == {"plan", "slim", "engine", "logits"}  # the original's dense graph serves every plan


def interrupt(arguments: list[str], when: Callable[[], bool], *, transient: bool = False) -> tuple[int, str]:
    """Start a command, press Ctrl-C as soon as ``when`` holds, and return its exit code and what it wrote to stderr."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not when():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
        if transient:  # a Ctrl-C that meets a fork can be swallowed by it (CPython ignores it there): press again meanwhile
            time.sleep(0.3)
            while process.poll() is None and when():
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(0.3)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert stdout == ""
    return process.returncode, stderr


def test_an_interrupted_run_leaves_nothing_half_done_and_continues(tmp_path: Path) -> None:
    work = tmp_path / "work"
    many = ("--calibration-images", "240", "--eval-images", "200")
    arguments = command(work, "bundle", *many)

    code, stderr = interrupt(arguments, lambda: any(work.glob(".plan-*")), transient=True)
    assert code == 130, stderr
    assert "interrupted; nothing was half-written, and the same command resumes" in stderr  # a finaliser may grumble after it
    assert not list(work.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["work"]

    def measuring() -> bool:
        return any(work.glob("engine-*")) and any((time.time() - path.stat().st_mtime) > 0.3 for path in work.glob("engine-*"))

    code, stderr = interrupt(arguments, measuring)
    assert code == 130, stderr
    assert "interrupted; nothing was half-written, and the same command resumes" in stderr
    assert f'File "{ROOT}/export' not in stderr, stderr  # threads of multiprocessing may grumble, our own code may not
    finished = stages_in(work)
    assert {name.partition("-")[0] for name in finished} == {"plan", "dense", "slim", "engine"}
    assert [path.name for path in tmp_path.iterdir()] == ["work"]

    outcome = export_bundle(tiny(work, "bundle", calibration_images=240, eval_images=200))
    assert finished.items() <= stages_in(work).items()
    assert check_bundle(outcome.bundle).passed
    assert read(outcome.bundle / "manifest.json")["evaluation"]["images"] == 200


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    cache = StageCache(tmp_path / "work")

    def build(part: Path) -> None:
        (part / "half").write_text("of it")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        cache.make(cache.path("plan", seed=1), build)
    assert not list((tmp_path / "work").iterdir())


def test_a_stage_that_another_run_finished_first_is_taken(tmp_path: Path) -> None:
    cache = StageCache(tmp_path / "work")
    folder = cache.path("plan", seed=1)

    def build(part: Path) -> None:
        (part / "plan.json").write_text("{}")

    def slowly(part: Path) -> None:
        build(part)
        assert cache.make(folder, build)  # meanwhile, in another terminal

    cache.make(folder, slowly)
    assert (folder / "plan.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "work").iterdir()] == [folder.name]
    assert not cache.make(folder, build)


def test_a_stages_key_is_its_inputs(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    first = cache.path("plan", seed=1, images="a")
    assert first == cache.path("plan", images="a", seed=1)
    assert len({first, cache.path("plan", seed=2, images="a"), cache.path("slim", seed=1, images="a")}) == 3


def test_a_work_folder_that_is_a_file_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("not a folder")
    with pytest.raises(Unavailable, match="pass --work") as caught:
        export_bundle(tiny(tmp_path / "work", "bundle"))
    assert caught.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
