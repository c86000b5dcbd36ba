"""Doing it again: finished stages are reused, the bundle is the same to the byte, and an interrupted run continues."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export import export_bundle
from export.cache import SETTLED_NS, FactStore, StageCache
from export.source import ExportSource
from patchslim.errors import InputRejected, Unavailable
from slimming.data.digits import render
from tests.helpers.exports import ARGUMENTS, MODEL, ROOT, command, digests, read, stages_in, tiny
from tests.helpers.forks import start_command
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


@pytest.mark.parametrize("engine", ["ort", "trt"])
def test_a_second_run_imports_nothing_that_only_a_stage_needs(
    request: pytest.FixtureRequest, export_work: Path, engine: str
) -> None:
    outcome: Outcome = request.getfixturevalue(f"{engine}_export")
    targets = ("--engine", "trt", "--target", "sm89") if engine == "trt" else ()
    door, _, module, *arguments = command(export_work, outcome.bundle.name, *targets)
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"
        "finally: print('loaded:', *({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([door, "-c", code, module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.rpartition("loaded: ")[2].split())
    assert "export" in loaded
    assert not loaded & {"torch", "torchvision", "timm", "sklearn", "onnx", "onnxruntime", "matplotlib", "tensorrt_rtx"}


def test_an_empty_work_folder_gives_the_same_bytes(ort_export: Outcome, tmp_path: Path) -> None:
    outcome = export_bundle(tiny(tmp_path / "work", ort_export.bundle.name))
    assert digests(outcome.bundle) == digests(ort_export.bundle)
    kinds = {name.partition("-")[0] for name in stages_in(tmp_path / "work")}
    assert kinds == {"plan", "dense", "slim", "engine", "logits", "picture", "golden", "report", "sbom"}


def test_only_what_a_choice_changes_is_made_again(ort_export: Outcome, export_work: Path) -> None:
    before = set(stages_in(export_work))
    export_bundle(tiny(export_work, "images", eval_images=36))
    made = {name.partition("-")[0] for name in set(stages_in(export_work)) - before}
    assert made == {"logits", "golden", "report"}
    before = set(stages_in(export_work))
    export_bundle(tiny(export_work, "budget", macs_reduction=0.2))
    made = {name.partition("-")[0] for name in set(stages_in(export_work)) - before}
    assert made == {
        "plan",
        "dense",
        "slim",
        "engine",
        "logits",
        "picture",
        "report",
    }  # the weights are fitted to the plan, so the dense graph is too
    before = set(stages_in(export_work))
    export_bundle(tiny(export_work, "budget", macs_reduction=0.2, fit="none", seed=77))  # a model that no other test uses
    made = {name.partition("-")[0] for name in set(stages_in(export_work)) - before}
    assert made == {"plan", "dense", "slim", "engine", "logits", "picture", "report", "sbom"}
    before = set(stages_in(export_work))
    export_bundle(tiny(export_work, "budget", macs_reduction=0.3, fit="none", seed=77))
    made = {name.partition("-")[0] for name in set(stages_in(export_work)) - before}
    assert made == {"plan", "slim", "engine", "logits", "picture", "report"}  # the original's dense graph serves every plan


def rewrite(path: Path, content: bytes) -> None:
    """Other content of the same length, with the old time of change put back."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


SHALLOW = (*ARGUMENTS, "depth=1")


def weights_file(seed: int) -> bytes:
    """The weights of the small model with one block, drawn from ``seed``, as a file's bytes."""
    from safetensors.torch import save

    from slimming.models.loading import load_model, parse_arguments

    loaded = load_model(MODEL, weights="random", arguments=parse_arguments(SHALLOW), classes=10, seed=seed)
    return save(loaded.module.state_dict())


def test_changed_weights_are_noticed_whatever_their_file_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.cache.SETTLED_NS", 0)
    work, path = tmp_path / "work", tmp_path / "weights.safetensors"
    path.write_bytes(weights_file(1))
    options = tiny(work, "bundle", weights=str(path), model_arg=SHALLOW, dense=True)
    first = export_bundle(options)
    stages = set(stages_in(work))
    assert any((work / "facts").glob("source-*"))
    rewrite(path, weights_file(2))
    second = export_bundle(options)
    made = [name.partition("-")[0] for name in set(stages_in(work)) - stages]
    assert sorted(made) == ["dense", "engine", "logits", "logits", "logits", "report", "sbom", "slim"]
    assert first.parity.rungs[0].top1 != second.parity.rungs[0].top1


def test_changed_images_are_noticed_whatever_their_files_look_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.cache.SETTLED_NS", 0)
    for index in range(10):
        image, digit, _ = render("train", index)
        place = tmp_path / "images" / ("even", "odd")[digit % 2] / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.resize((48, 48)).save(place)
    options = tiny(tmp_path / "work", data=str(tmp_path / "images"))

    def fingerprints() -> list[str]:
        facts = FactStore(tmp_path / "facts")
        source = ExportSource(options, facts)
        found = [source.calibration_fingerprint, source.evaluation_fingerprint]
        facts.save()
        return found

    before = fingerprints()
    assert len(list((tmp_path / "facts").iterdir())) == 3
    assert fingerprints() == before
    for path in (tmp_path / "images").rglob("*.png"):
        rewrite(path, path.read_bytes()[:-1] + b"\x07")
    assert not set(fingerprints()) & set(before)


def test_weights_beside_a_given_plan_that_changed_are_refused(
    ort_export: Outcome, export_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.cache.SETTLED_NS", 0)
    stated = read(ort_export.bundle / "plan.json")  # which names no file of weights
    plans = sorted(export_work.glob("plan-*/plan.json"))
    found = next(path for path in plans if read(path) | {"weights": (read(path)["weights"] or {}) | {"file": None}} == stated)
    plan = tmp_path / "plan.json"
    shutil.copy(found, plan)
    weights = tmp_path / read(found)["weights"]["file"]
    shutil.copy(found.with_name(weights.name), weights)
    options = tiny(export_work, "given", plan=plan)
    assert digests(export_bundle(options).bundle)["model.onnx"] == digests(ort_export.bundle)["model.onnx"]
    content = weights.read_bytes()
    rewrite(weights, content[:-4] + b"\0\0\0\x40")  # the last float32 of a tensor becomes 2
    with pytest.raises(InputRejected, match=r"not the weights that plan\.json was made with"):
        export_bundle(options)


def test_changed_code_makes_every_stage_again(tmp_path: Path) -> None:
    rooms = ("export", "graph_passes", "patchslim", "slimming", "validate")
    for path in (path for room in rooms for path in (ROOT / room).rglob("*.py")):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    code = (
        "from pathlib import Path\nfrom export.cache import StageCache, FactStore\n"
        "print(StageCache(Path('work')).path('plan', seed=1).name, FactStore(Path('facts')).path('digest', []).name)"
    )

    def keys() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    before = keys()
    assert keys() == before
    with (tmp_path / "slimming" / "search" / "scores.py").open("a") as file:
        file.write("# changed\n")
    assert not set(keys()) & set(before)


def test_a_fact_is_found_out_again_when_a_file_or_an_input_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.cache.SETTLED_NS", 0)
    asked: list[object] = []

    def known(**inputs: object) -> object:
        facts = FactStore(tmp_path / "facts")

        def find_out() -> tuple[int, str]:
            asked.append(inputs)
            return len(asked), (tmp_path / "images" / "a.txt").read_text()

        value = facts.recall("text", find_out, files=[tmp_path / "images"], **inputs)
        facts.save()
        return value

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.txt").write_text("old")
    time.sleep(0.02)  # a tick of the file system's clock
    assert known(seed=1) == known(seed=1) == [1, "old"]
    assert known(seed=2) == [2, "old"]
    rewrite(tmp_path / "images" / "a.txt", b"new")
    time.sleep(0.02)
    assert known(seed=1) == known(seed=1) == [3, "new"]
    (tmp_path / "images" / "b.txt").touch()
    time.sleep(0.02)
    assert known(seed=1) == known(seed=1) == [4, "new"]
    for number, damaged in enumerate(("half of", "3", "null", '"text"', "[1]", "{}", "[" * 100_000), 5):
        for path in (tmp_path / "facts").iterdir():
            path.write_text(damaged)
        assert known(seed=1) == known(seed=1) == [number, "new"]


def test_what_is_known_of_a_file_is_kept_once_that_has_been_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("just now: another write may leave the same times")
    facts = FactStore(tmp_path / "facts")
    value = facts.digest(tmp_path / "a.txt")
    facts.save()
    assert not (tmp_path / "facts").exists()
    time.sleep(SETTLED_NS / 1e9 + 0.1)
    facts = FactStore(tmp_path / "facts")
    assert facts.digest(tmp_path / "a.txt") == value
    facts.save()
    assert len(list((tmp_path / "facts").iterdir())) == 1


def test_what_changes_during_a_run_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.cache.SETTLED_NS", 0)
    (tmp_path / "a.txt").write_text("old")
    time.sleep(0.02)
    facts = FactStore(tmp_path / "facts")
    facts.digest(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("other")
    facts.save()
    assert not (tmp_path / "facts").exists()


def interrupt(arguments: list[str], when: Callable[[], bool], folder: Path, *, transient: bool = False) -> tuple[int, str]:
    """Start a command, press Ctrl-C as soon as ``when`` holds, and return its exit code and what it wrote to stderr."""
    stdout, stderr = folder / "stdout.txt", folder / "stderr.txt"
    process = start_command(arguments, stdout, stderr)
    assert process.pid is not None
    try:
        deadline = time.monotonic() + 120
        while not when():
            assert process.is_alive(), stderr.read_text(encoding="utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
        if transient:  # a Ctrl-C that meets a fork can be swallowed by it (CPython ignores it there): press again meanwhile
            time.sleep(0.3)
            while process.is_alive() and when():
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(0.3)
        process.join(60)
        code = process.exitcode
    finally:
        process.kill()
    assert stdout.read_text(encoding="utf-8") == ""
    assert code is not None
    return code, stderr.read_text(encoding="utf-8")


def test_an_interrupted_run_leaves_nothing_half_done_and_continues(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    work, said = tmp_path / "work", tmp_path_factory.mktemp("said")
    many = ("--calibration-images", "240", "--eval-images", "200")
    arguments = command(work, "bundle", *many)

    code, stderr = interrupt(arguments, lambda: any(work.glob(".plan-*")), said, transient=True)
    assert code == 130, stderr
    assert "interrupted; nothing was half-written, and the same command resumes" in stderr  # a finaliser may grumble after it
    assert not list(work.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["work"]

    def measuring() -> bool:
        return any(work.glob("engine-*")) and any((time.time() - path.stat().st_mtime) > 0.3 for path in work.glob("engine-*"))

    code, stderr = interrupt(arguments, measuring, said)
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
