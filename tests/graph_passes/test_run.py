"""The door ``python -m graph_passes.run``: what it writes, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from graph_passes import PASSES
from graph_passes.run import main
from patchslim.plan import SlimPlan, load_plan
from tests.helpers.onnx_models import dense, ort_logits, plan_for, reference, tiny_cnn

PLAN = [list(range(0, 17, 2)), [0, 4, 8, 12], [0, 4, 8, 12], [0]]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def plan() -> SlimPlan:
    return plan_for(dense("plain")[0], PLAN)


@pytest.fixture
def files(tmp_path: Path, plan: SlimPlan) -> tuple[Path, Path, Path]:
    """``(model, plan, output)`` paths; the first two exist."""
    model, plan_file = tmp_path / "dense.onnx", tmp_path / "plan.json"
    model.write_bytes(dense("plain")[1].SerializeToString())
    plan.save(plan_file)
    return model, plan_file, tmp_path / "slim.onnx"


def door(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["graph_passes.run", *map(str, arguments)])
    return main()


def test_it_writes_the_slim_model_a_report_and_the_intermediates(
    files: tuple[Path, Path, Path],
    plan: SlimPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, plan_file, output = files
    report, steps = tmp_path / "report.json", tmp_path / "steps"
    code = door(
        monkeypatch, model, "--plan", plan_file, "-o", output, "--layout", "packed", "--report", report,
        "--save-intermediates", steps, "--json",
    )  # fmt: skip
    assert code == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads(report.read_text())
    assert summary["plan_macs"] == plan.macs("packed")
    sites = {entry["name"]: entry["sites"] for entry in summary["passes"]}
    assert [*sites] == [
        "fold_constants", "expand_attention", "find_blocks", "repair_reshapes", "fold_scale", "fold_norm", "order_tokens",
        "cut_tokens", "drop_unit_axes", "elide_identities", "fold_bias",
    ]  # fmt: skip
    wanted = {"find_blocks": 0, "repair_reshapes": 8, "fold_scale": 4, "order_tokens": 1, "cut_tokens": 3}
    assert {name: sites[name] for name in wanted} == wanted
    slimmed = onnx.load(output)
    np.testing.assert_allclose(ort_logits(slimmed, IMAGES), reference(dense("plain")[0], plan, IMAGES), atol=1e-4)
    names = [f"{number:02d}_{entry['name']}.onnx" for number, entry in enumerate(summary["passes"]) if entry["modified"]]
    assert sorted(path.name for path in steps.iterdir()) == names
    assert (steps / names[-1]).read_bytes() == output.read_bytes()

    again = tmp_path / "again.onnx"
    assert door(monkeypatch, output, "--plan", plan_file, "--output", again, "--layout", "packed") == 0
    assert "no" in capsys.readouterr().out
    assert again.read_bytes() == output.read_bytes()


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "cannot be read"),
        (b"", "empty"),
        (b"this is not a protobuf" * 50, "not an ONNX file"),
        (truncated(dense("plain")[1].SerializeToString()), "truncated"),
        (onnx.ModelProto(ir_version=10).SerializeToString(), "no nodes"),
        (tiny_cnn().SerializeToString(), "not a Vision Transformer"),
    ],
    ids=["missing", "empty", "garbage", "truncated", "no nodes", "cnn"],
)
def test_a_model_that_cannot_be_used_is_rejected(
    content: bytes | None,
    fault: str,
    files: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, plan_file, output = files
    model.unlink()
    if content is not None:
        model.write_bytes(content)
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output) == 3
    error = capsys.readouterr().err
    assert str(model) in error
    assert fault in error
    assert not output.exists()


@pytest.mark.parametrize("step", range(1, 30, 3))
def test_a_damaged_file_never_gets_through_and_never_crashes(
    step: int, files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan_file, output = files
    data = model.read_bytes()
    model.write_bytes(data[: len(data) * step // 30])
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output) == 3
    assert str(model) in capsys.readouterr().err


@pytest.mark.parametrize("flip", range(24))
def test_flipped_bytes_are_rejected_or_harmless_but_never_a_crash(
    flip: int, files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan_file, output = files
    data = bytearray(model.read_bytes())
    rng = np.random.default_rng(flip)
    for position in rng.integers(0, min(len(data), 30_000), 40):
        data[position] ^= int(rng.integers(1, 256))
    model.write_bytes(bytes(data))
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output) in (0, 3)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tokens": 18, "prefix_tokens": 2}, "prefix tokens: the graph has 1, the plan says 2"),
        ({"kept": PLAN[1:]}, "blocks: the graph has 4, the plan says 3"),
        ({"grid": [2, 8]}, "patch grid: the graph has (4, 4), the plan says (2, 8)"),
        ({"geometry": {"embed_dim": 64, "mlp_hidden_dim": 96, "patch_macs": 1, "head_macs": 1}}, "token width"),
        ({"kept": [[0, 99]] * 4}, "kept[0]"),
        ({"kept": [[0, 3], [0, 4], [0], [0]]}, "not nested"),
    ],
)
def test_a_plan_that_does_not_fit_is_rejected_with_both_names(
    change: dict[str, object],
    fault: str,
    files: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, plan_file, output = files
    text = json.loads(plan_file.read_text()) | change
    if text["prefix_tokens"] == 2:
        text["kept"] = [[0, 1, *range(4, 9)], [0, 1, 4], [0, 1, 4], [0]]
    plan_file.write_text(json.dumps(text))
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output) == 3
    error = capsys.readouterr().err
    assert fault in error
    assert str(plan_file) in error
    assert str(model) in error or "not a valid plan" in error
    assert not output.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 2}'])
def test_a_broken_plan_is_rejected(
    content: str, files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan_file, output = files
    plan_file.write_text(content)
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output) == 3
    assert str(plan_file) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("location", "fault"), [("../secret", "outside"), ("/etc/hostname", "outside"), ("gone.data", "missing")]
)
def test_external_data_must_lie_in_the_models_folder(
    location: str,
    fault: str,
    files: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, plan_file, output = files
    proto = onnx.load(model)
    onnx.external_data_helper.set_external_data(proto.graph.initializer[0], location)
    proto.graph.initializer[0].ClearField("raw_data")
    model.write_bytes(proto.SerializeToString())
    (model.parent.parent / "secret").write_bytes(b"x" * 10_000)
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output) == 3
    error = capsys.readouterr().err
    assert str(model) in error
    assert fault in error


def test_external_data_is_read(files: tuple[Path, Path, Path], plan: SlimPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan_file, output = files
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="dense.data", size_threshold=100)
    assert (model.parent / "dense.data").exists()
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output) == 0
    np.testing.assert_allclose(ort_logits(onnx.load(output), IMAGES), reference(dense("plain")[0], plan, IMAGES), atol=1e-4)
    (model.parent / "dense.data").write_bytes(b"short")
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output) == 3


def test_wrong_options_exit_with_2(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan_file, output = files
    assert door(monkeypatch, model) == 2
    error = capsys.readouterr().err
    assert "--plan" in error
    assert "slimming.run --onnx" in error
    assert "cut_last_block" in error
    assert door(monkeypatch, "--plan", plan_file, "-o", output) == 2
    assert "MODEL missing" in capsys.readouterr().err
    assert door(monkeypatch, "--explain", "no_such_pass") == 2
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output, "--passes", "no_such_pass") == 2
    assert "no_such_pass" in capsys.readouterr().err


def test_list_and_explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert door(monkeypatch, "--list") == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert [*lines] == [*PASSES]
    assert lines["cut_tokens"].split()[:2] == ["default", "plan"]
    assert lines["cut_last_block"].split()[0] == "optional"
    assert all(PASSES[name].summary in line for name, line in lines.items())
    assert door(monkeypatch, "--explain", "cut_tokens") == 0
    assert "rectangular attention" in capsys.readouterr().out


def test_help_is_quick_and_heavy_libraries_stay_out() -> None:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "graph_passes.run", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 3  # under one second on an idle machine
    assert "--plan" in done.stdout
    code = (
        "import sys, graph_passes.run; print([m for m in ('onnx', 'onnx_graphsurgeon', 'torch', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_it_runs_without_torch(files: tuple[Path, Path, Path]) -> None:
    model, plan_file, output = files
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'timm'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        f"sys.argv = ['run', {str(model)!r}, '--plan', {str(plan_file)!r}, '-o', {str(output)!r}, '--precision', 'fp16']\n"
        "from graph_passes.run import main; sys.exit(main())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    assert output.exists()


def test_one_pass_alone_makes_a_whole_model(files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan_file, output = files
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output, "--passes", "cut_tokens") == 0
    wanted = reference(dense("plain")[0], load_plan(plan_file), IMAGES)
    np.testing.assert_allclose(ort_logits(onnx.load(output), IMAGES), wanted, atol=1e-4)


def test_a_place_for_intermediates_that_is_a_file(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan_file, output = files
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output, "--save-intermediates", plan_file) == 2
    assert "--save-intermediates" in capsys.readouterr().err
    assert not output.exists()
