"""What ``python -m graph_passes.run`` checks before it writes: hidden values that pass float16, and names of outputs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from graph_passes import slim
from graph_passes.run import main
from patchslim.errors import ParityFailed
from tests.helpers.attacks.vit import plan, tiny_vit


def door(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["graph_passes.run", *map(str, arguments)])
    return main()


def _overflowing() -> onnx.ModelProto:
    """``tiny_vit`` whose MLP of block 1 gives values beyond float16, and is brought back by the weights behind it."""
    model = tiny_vit()
    for tensor in model.graph.initializer:
        if tensor.name in ("wu1", "wd1"):
            factor = 4e4 if tensor.name == "wu1" else 1e-3
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    return model


def test_fp16_is_refused_where_hidden_values_pass_it_with_the_layer_and_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output, report = tmp_path / "model.onnx", tmp_path / "half.onnx", tmp_path / "report.json"
    model.write_bytes(_overflowing().SerializeToString())
    plan().save(tmp_path / "plan.json")
    arguments = [model, "--plan", tmp_path / "plan.json", "--precision", "fp16", "-o", output, "--report", report]
    assert door(monkeypatch, *arguments) == 5
    error = capsys.readouterr().err
    found = re.search(r"MatMul node '[^']+' gives (\S+) on random images; float16 ends at 65504", error)
    assert found is not None, error
    assert float(found[1]) > 65504
    for step in ("--precision fp32", "bf16", "--allow-overflow"):
        assert step in error
    assert not output.exists()
    assert json.loads(report.read_text())["fp16"]["fits"] is False
    assert door(monkeypatch, *arguments, "--allow-overflow") == 0
    images = np.random.default_rng(0).standard_normal((1, 3, 8, 8), dtype=np.float32)
    with np.errstate(all="ignore"):  # ONNX's reference computes in float16 throughout; ONNX Runtime on a CPU need not
        answer = ReferenceEvaluator(onnx.load(output)).run(None, {"images": images})[0]
    assert not np.isfinite(answer).all(), "the check was for nothing"


def test_a_library_call_checks_hidden_values_where_that_is_asked_for() -> None:
    for model in (_overflowing(), tiny_vit()):
        unknown = slim(model, plan(), precision="fp16")
        assert unknown.fp16 is None
        assert slim(model, plan(), check_fp16=True).fp16 is None  # nothing becomes FP16
    with pytest.raises(ParityFailed, match=r"MatMul node '[^']+' gives \S+ on random images; float16 ends at 65504"):
        slim(_overflowing(), plan(), precision="fp16", check_fp16=True)
    found = slim(tiny_vit(), plan(), precision="fp16", check_fp16=True)
    assert found.fp16 is not None
    assert found.fp16.fits
    assert found.model.to_proto() == unknown.model.to_proto()


def test_fp16_is_checked_on_the_images_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, samples = tmp_path / "model.onnx", tmp_path / "images.npy"
    model.write_bytes(tiny_vit().SerializeToString())
    plan().save(tmp_path / "plan.json")
    np.save(samples, np.random.default_rng(0).standard_normal((5, 3, 8, 8)))
    arguments = [model, "--plan", tmp_path / "plan.json", "--precision", "fp16", "--json", "--samples", samples]
    assert door(monkeypatch, *arguments) == 0
    found = json.loads(capsys.readouterr().out)["fp16"]
    assert found["fits"] is True
    assert found["images"] == str(samples)
    assert 0 < found["largest"] < 100
    np.save(samples, np.zeros((5, 4, 8, 8)))
    assert door(monkeypatch, *arguments) == 3
    assert "ONNX Runtime cannot run it" in capsys.readouterr().err
    samples.write_bytes(b"not an array")
    assert door(monkeypatch, *arguments) == 3
    assert "cannot be read as images" in capsys.readouterr().err
    assert door(monkeypatch, model, "--allow-overflow", "--plan", tmp_path / "plan.json") == 2
    assert "--precision fp16" in capsys.readouterr().err


def test_fp16_is_checked_on_pixels_where_the_model_takes_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny_vit().SerializeToString())
    plan().save(tmp_path / "plan.json")
    normalised = ["--mean", "0.5", "0.5", "0.5", "--std", "0.001", "0.001", "0.001"]
    arguments = [tmp_path / "model.onnx", "--plan", tmp_path / "plan.json", "--precision", "fp16", "--json", *normalised]
    largest = {}
    for image in ("uint8-nchw", "float-nchw-255"):
        assert door(monkeypatch, *arguments, "--image", image) == 0
        largest[image] = json.loads(capsys.readouterr().out)["fp16"]["largest"]
    assert largest["uint8-nchw"] == pytest.approx(largest["float-nchw-255"], rel=1e-5)  # white images, not noise


@pytest.mark.parametrize(("name", "code"), [("a b [c] é.onnx", 0), ("x" * 250 + ".onnx", 2), ("folder", 2)])
def test_an_output_of_an_odd_name_is_written_or_refused_before_the_work(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.onnx"
    (tmp_path / "folder").mkdir()
    model.write_bytes(tiny_vit().SerializeToString() if code == 0 else b"not read")
    plan().save(tmp_path / "plan.json")
    assert door(monkeypatch, model, "--plan", tmp_path / "plan.json", "-o", tmp_path / name) == code
    assert code == 0 or "--output" in capsys.readouterr().err
    assert (tmp_path / name).is_file() is (code == 0)


def test_what_was_done_to_the_graph_first_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_vit()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    plan().save(tmp_path / "plan.json")
    arguments = [tmp_path / "model.onnx", "--plan", tmp_path / "plan.json"]
    assert door(monkeypatch, *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["prepared"] == ["nodes put in topological order"]
    assert door(monkeypatch, *arguments) == 0
    assert "first: nodes put in topological order" in capsys.readouterr().out
