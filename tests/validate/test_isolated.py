"""Models that a stranger made to take all time or memory are ended; what runs is what was hashed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from patchslim.errors import InputRejected
from patchslim.ort_runner import OrtRunner
from tests.helpers.attacks.bundle_graphs import write_endless
from tests.helpers.bundles import SIZE, make_bundle, reseal, weight, write_onnx
from validate import check_bundle, load_manifest
from validate.isolated import IsolatedRunner, Limits

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def test_answers_are_those_of_onnx_runtime(bundle: Path) -> None:
    images = np.random.default_rng(0).standard_normal((5, 3, SIZE, SIZE)).astype(np.float32)
    manifest = load_manifest(bundle)
    for name in ("model.onnx", "model-fp16.onnx"):
        with IsolatedRunner(bundle, manifest, name, Limits(), threads=1) as runner, OrtRunner(bundle / name) as here:
            assert (runner.inputs, runner.outputs) == (here.inputs, here.outputs)
            assert (runner.name, runner.batch_limits) == (here.name, here.batch_limits)
            np.testing.assert_array_equal(runner.infer(images), here.infer(images))


@pytest.mark.slow  # it waits until its time is over
def test_a_loop_without_end_is_ended(bundle: Path) -> None:
    write_endless(bundle / "model.onnx")
    reseal(bundle)
    start = time.monotonic()
    verdict = check_bundle(bundle, limits=Limits(timeout=6.0), threads=1)
    assert time.monotonic() - start < 60
    assert verdict.exit_code == 3
    assert f"{bundle / 'model.onnx'}: did not answer within 6 s; a slow machine needs a larger --timeout" in verdict.faults
    assert [each.subject for each in verdict.checks if each.name == "golden parity"] == ["model-fp16.onnx"]


def test_memory_that_is_enough_for_nothing(bundle: Path) -> None:
    verdict = check_bundle(bundle, limits=Limits(memory=1 << 20), threads=1)
    assert verdict.exit_code == 3
    assert "memory" in verdict.faults[0]
    assert check_bundle(bundle, limits=Limits(memory=0), threads=1).passed


@pytest.mark.parametrize("external", [False, True])
def test_what_runs_is_what_the_manifest_lists(bundle: Path, external: bool) -> None:
    """The file is exchanged after it was hashed, and has the same size."""
    write_onnx(bundle / "model.onnx", weight(), external="weights.bin" if external else None)
    reseal(bundle)
    manifest = load_manifest(bundle)
    changed = bundle / ("weights.bin" if external else "model.onnx")
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    with pytest.raises(InputRejected, match=rf"{changed.name}: its (size or )?SHA-256 is not the one in manifest\.json"):
        IsolatedRunner(bundle, manifest, "model.onnx", Limits())


def test_nothing_stays_behind(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    write_onnx(bundle / "model.onnx", weight(), external="weights.bin")
    reseal(bundle)
    with IsolatedRunner(bundle, load_manifest(bundle), "model.onnx", Limits()) as runner:
        assert [path.suffix for path in (tmp_path / "temporary").rglob("*") if path.is_file()]
        process = runner._process  # the test's only way to it
    assert process.poll() is not None
    assert not list((tmp_path / "temporary").iterdir())


def test_the_worker_ends_with_its_parent(bundle: Path) -> None:
    write_endless(bundle / "model.onnx")
    reseal(bundle)
    command = [sys.executable, "-m", "validate.run", str(bundle), "--threads", "1"]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    found: list[int] = []
    for _ in range(400):
        found = [int(number) for number in children.read_text().split()]
        if found:
            break
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert found
    for _ in range(200):
        if not Path(f"/proc/{found[0]}").exists() or "State:\tZ" in Path(f"/proc/{found[0]}/status").read_text():
            break
        time.sleep(0.05)
    else:
        os.kill(found[0], 9)
        pytest.fail("the worker runs on")
