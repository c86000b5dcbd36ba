"""Hostile and broken graphs at the door: each is refused by name, with exit 3, and nothing is written or changed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from graph_passes.run import main
from tests.helpers.attacks import damages, files, graphs, shapes  # noqa: F401 - register their attacks
from tests.helpers.attacks.registry import ATTACKS, Attack, put
from tests.helpers.attacks.vit import plan, tiny_vit

#: An attack that runs alone may take this much address space and time: a sound model of its size needs a tenth of either.
LIMIT_BYTES, LIMIT_SECONDS = 2**33, 120


def arguments(folder: Path) -> list[str]:
    """The door's arguments for ``folder / "in" / "model.onnx"``; where the result would go, an earlier one stands."""
    plan().save(folder / "plan.json")
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "slim.onnx").write_bytes(b"an earlier result")
    return [str(folder / "in" / "model.onnx"), "--plan", str(folder / "plan.json"), "-o", str(folder / "out" / "slim.onnx")]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file under a folder with its bytes; None for what is no file."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(code: int, error: str, report: str, model: Path, fault: str) -> None:
    """Exit 3, a message that names the file and the fault, and, for what could be read as a graph, the site in the report."""
    assert code == 3, error
    assert "Traceback" not in error
    message = error[error.index("graph_passes.run: ") :]
    assert str(model) in message
    assert re.search(fault, message), message
    assert len(message) < 2000
    sites = re.findall(r"^refused at (.*)$", report, flags=re.MULTILINE)
    if re.search("that the passes understand: | refused at ", message):
        assert any(site in message for site in sites), report
    else:
        assert report == "" or sites == [f"plan: {message.partition('plan.json: ')[2].strip()}"]


@pytest.mark.parametrize("case", [case for case in ATTACKS if not case.alone], ids=lambda case: case.name)
def test_it_is_refused_by_name(
    case: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    model = case.write(tmp_path / "in")
    monkeypatch.setattr(sys, "argv", ["graph_passes.run", *arguments(tmp_path)])
    before = contents(tmp_path)
    code = main()
    captured = capfd.readouterr()
    assert_refused(code, captured.err, captured.out, model, case.fault)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("case", [case for case in ATTACKS if case.alone], ids=lambda case: case.name)
def test_it_is_refused_without_crash_hang_or_all_the_memory(case: Attack, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    model = case.write(tmp_path / "in")
    command = [*arguments(tmp_path)]
    before = contents(tmp_path)
    limited = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({LIMIT_BYTES}, {LIMIT_BYTES}))\n"
        "from graph_passes.run import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, *command], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert_refused(done.returncode, done.stderr, done.stdout, model, case.fault)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 30))])
def test_flipped_bytes_are_refused_or_give_a_model_that_can_be_cut(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ten variants each; one to four bytes of what is not a weight's value are changed."""
    (tmp_path / "in").mkdir()
    model, sound, rng = tmp_path / "in" / "model.onnx", tiny_vit().SerializeToString(), np.random.default_rng(seed)
    values = [(sound.index(tensor.raw_data), len(tensor.raw_data)) for tensor in tiny_vit().graph.initializer]
    inside = {place for start, length in values if length > 64 for place in range(start, start + length)}
    places = [place for place in range(len(sound)) if place not in inside]
    monkeypatch.setattr(sys, "argv", ["graph_passes.run", *arguments(tmp_path)])
    for _ in range(10):
        data = bytearray(sound)
        for place in rng.choice(places, rng.integers(1, 5), replace=False):
            data[place] ^= 1 << rng.integers(8)
        model.write_bytes(data)
        arguments(tmp_path)
        before = contents(tmp_path)
        code = main()
        printed, after = capfd.readouterr(), contents(tmp_path)
        if code:
            assert_refused(code, printed.err, printed.out, model, "")
            assert after == before
        else:
            result = tmp_path / "out" / "slim.onnx"
            assert {name for name in after if after[name] != before.get(name)} == {"out/slim.onnx"}
            onnx.checker.check_model(str(result), full_check=True)


def test_weights_that_are_not_numbers_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reads a weight to judge it: a model of NaN is cut, and still says NaN."""
    (tmp_path / "in").mkdir()
    model = tiny_vit()
    put(model, "wo0", np.full((8, 8), np.nan, np.float32))
    onnx.save(model, tmp_path / "in" / "model.onnx")
    monkeypatch.setattr(sys, "argv", ["graph_passes.run", *arguments(tmp_path)])
    assert main() == 0
    session = ort.InferenceSession(str(tmp_path / "out" / "slim.onnx"), providers=["CPUExecutionProvider"])
    assert np.isnan(session.run(None, {"images": np.ones((1, 3, 8, 8), np.float32)})[0]).all()
