"""The report of ``python -m graph_passes.run``: what it counts, and that a refusal is in it with its reason."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest

from graph_passes.report import Report
from graph_passes.run import main
from patchslim.plan import SlimPlan
from tests.helpers.onnx_models import dense, macs_of_graph, plan_for, tiny_cnn

PLAN = [list(range(0, 17, 2)), [0, 4, 8, 12], [0, 4, 8, 12], [0]]


@pytest.fixture
def plan() -> SlimPlan:
    return plan_for(dense("plain")[0], PLAN)


@pytest.fixture
def folder(tmp_path: Path, plan: SlimPlan) -> Path:
    """Holds ``dense.onnx`` and ``plan.json``."""
    (tmp_path / "dense.onnx").write_bytes(dense("plain")[1].SerializeToString())
    plan.save(tmp_path / "plan.json")
    return tmp_path


def door(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["graph_passes.run", *map(str, arguments)])
    return main()


def read(path: Path) -> Report:
    return Report.model_validate_json(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_nodes_tokens_and_macs_before_and_after(
    layout: str, folder: Path, plan: SlimPlan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (folder / "dense.onnx", "--plan", folder / "plan.json", "-o", folder / "slim.onnx", "--layout", layout)
    assert door(monkeypatch, *arguments, "--report", folder / "report.json") == 0
    report = read(folder / "report.json")
    assert report.after is not None
    for picture, name in ((report.before, "dense"), (report.after, "slim")):
        model = onnx.load(folder / f"{name}.onnx")
        assert picture.operators == Counter(node.op_type for node in model.graph.node)
        assert picture.nodes == len(model.graph.node)
        assert picture.vit is not None
        assert picture.vit.macs == macs_of_graph(model)
        assert picture.vit.macs == picture.vit.stem_macs + sum(b.macs for b in picture.vit.blocks) + picture.vit.head_macs
    before, after = report.before.vit, report.after.vit
    assert before is not None
    assert after is not None
    assert (before.tokens, before.width, before.grid, before.prefix_tokens, before.head_tokens) == (17, 48, (4, 4), 1, [0])
    assert [(block.reads, block.computes) for block in before.blocks] == [(17, 17)] * 4
    assert [(block.reads, block.computes) for block in after.blocks] == [(17, 9), (9, 4), (4, 4), (4, 1)]
    assert (before.macs, after.macs) == (plan.dense_macs(), plan.macs(layout))
    assert report.macs_reduction == pytest.approx(1 - after.macs / before.macs)
    assert (report.refused, report.error) == ([], None)
    text = capsys.readouterr().out
    assert "17 -> 9" in text
    assert f"{before.macs / 1e6:.2f} -> {after.macs / 1e6:.2f} million" in text
    assert f"written: {folder / 'slim.onnx'}" in text


def test_parameters_are_those_of_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = folder / "report.json"
    assert door(monkeypatch, folder / "dense.onnx", "--passes", "find_blocks", "--report", report) == 0
    parameters = sum(parameter.numel() for parameter in dense("plain")[0].parameters())
    assert read(report).before.parameters == pytest.approx(parameters, rel=1e-3)  # and the exporter's scales


def test_without_output_it_tells_whether_the_model_is_understood(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door(monkeypatch, folder / "dense.onnx", "--passes", "find_blocks") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "4 blocks of width 48; 17 tokens: 1 prefix and a patch grid of 4 x 4; the head reads token 0" in text
    assert "0 to 3, each" in text
    assert "nothing written: no --output" in text
    assert sorted(path.name for path in folder.iterdir()) == ["dense.onnx", "plan.json"]


def test_a_dry_run_says_what_would_change_and_writes_nothing(
    folder: Path, plan: SlimPlan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door(monkeypatch, folder / "dense.onnx", "--plan", folder / "plan.json", "--json") == 0
    report = Report.model_validate_json(capsys.readouterr().out)
    assert report.modified
    assert report.output is None
    assert report.after is not None
    assert report.after.vit is not None
    assert report.after.vit.macs == plan.macs()
    assert sorted(path.name for path in folder.iterdir()) == ["dense.onnx", "plan.json"]


def test_a_refused_site_is_in_the_report_of_the_run_that_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan_file, output, report = (folder / name for name in ("dense.onnx", "plan.json", "slim.onnx", "report.json"))
    other = folder / "other.json"
    plan_for(dense("plain")[0], [[*range(9)], [0, 1, 2], [0, 1, 2], [0]]).save(other)
    assert door(monkeypatch, model, "--plan", plan_file, "-o", output) == 0
    capsys.readouterr()
    slim = output.read_bytes()
    code = door(monkeypatch, output, "--plan", other, "-o", folder / "again.onnx", "--report", report, "--json")
    assert code == 3
    out, error = capsys.readouterr()
    written = read(report)
    printed = json.loads(out)
    assert (printed["error"]["code"], printed["error"]["kind"]) == (3, "InputRejected")
    assert Report.model_validate(printed | {"before": written.before, "error": written.error}) == written
    assert (written.output, written.after, written.modified, written.nodes) == (None, None, False, None)
    assert len(written.refused) == 1
    assert "already cut" in written.refused[0].reason
    assert {entry.name for entry in written.passes if entry.refused} >= {"order_tokens", "cut_tokens"}
    assert written.error is not None
    assert written.error in error
    assert not (folder / "again.onnx").exists()
    assert output.read_bytes() == slim


def test_a_plan_for_another_model_is_in_the_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(text | {"kept": PLAN[1:]}))
    report = folder / "report.json"
    assert door(monkeypatch, folder / "dense.onnx", "--plan", folder / "plan.json", "--report", report) == 3
    assert [refusal.site for refusal in read(report).refused] == ["plan"]
    assert "blocks: the graph has 4, the plan says 3" in read(report).refused[0].reason


def test_a_graph_that_is_no_vision_transformer_is_counted_and_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(tiny_cnn(), folder / "cnn.onnx")
    assert door(monkeypatch, folder / "cnn.onnx", "--passes", "find_blocks", "--report", folder / "report.json") == 3
    report = read(folder / "report.json")
    assert report.before.vit is None
    assert report.before.operators == {"Conv": 1, "Flatten": 1, "GlobalAveragePool": 1, "Softmax": 1}
    assert len(report.refused) == 1
    assert report.refused[0].reason in capsys.readouterr().out
