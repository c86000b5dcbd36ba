"""Several engines asked for: by name or all, each with its own options, and what is refused before anything slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export import export_bundle
from export.begin import begin
from export.engines.base import parse_engines
from export.run import run
from patchslim.errors import Unavailable
from tests.helpers.exports import tiny, without

pytest.importorskip("openvino")


def test_the_dry_run_describes_each(export_work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny(export_work, "several", engine="ort,openvino", dry_run=True, json=True)) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["backend"] == "onnxruntime"
    assert described["engines"] == [
        {"engine": "ort", "backend": "onnxruntime", "targets": ["cpu"], "precision": "fp32", "layout": "split"},
        {"engine": "openvino", "backend": "openvino", "targets": ["cpu"], "precision": "auto", "layout": "split"},
    ]
    assert "left_out" not in described
    assert run(tiny(export_work, "several", engine="ort,openvino", dry_run=True)) == 0
    assert "openvino for cpu, auto, split qkv" in capsys.readouterr().out
    assert run(tiny(export_work, "several", dry_run=True, json=True)) == 0
    assert "engines" not in json.loads(capsys.readouterr().out)


def test_the_bundle_is_named_by_its_engines(tmp_path: Path) -> None:
    assert tiny(tmp_path, engine="ort,openvino", output=None).bundle == Path("bundles/vit_tiny_patch16_224-ort-openvino")
    assert tiny(tmp_path, engine="trt", output=None).bundle == Path("bundles/vit_tiny_patch16_224-trt")
    assert parse_engines("trt,ort") == ("trt", "ort")


def test_each_engine_has_the_options_that_are_for_it(tmp_path: Path) -> None:
    options = tiny(
        tmp_path, engine="ort,openvino,trt", target=("sm89",), batch="1:2:4", require_fused_attention=True, keep_fp32=("x",)
    )
    options.check()
    ort, openvino, trt = (options.for_engine(name) for name in options.engines)
    assert (ort.targets, trt.targets) == ((), ("sm89",))
    assert [one.batch_profile for one in (ort, openvino, trt)] == [(1, 8, 32), (1, 8, 32), (1, 2, 4)]
    assert [one.engine_precision for one in (ort, openvino, trt)] == ["fp32", "fp32", "fp16"]
    assert [one.keep_fp32 for one in (ort, openvino, trt)] == [(), ("x",), ()]
    assert [one.require_fused_attention for one in (ort, openvino, trt)] == [False, False, True]
    assert (options.layout, options.search_layout, options.other_layouts) == ("split", "packed", ("split",))
    assert options.request(options.search_layout).also == ("split",)
    assert not tiny(tmp_path, engine="ort,openvino").other_layouts
    assert not tiny(tmp_path, engine="trt").other_layouts
    assert tiny(tmp_path, engine="ort,openvino").search_layout == "split"


def test_all_takes_what_is_here_and_says_why_not_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "tensorrt", "tensorrt_rtx")
    begun = begin(tiny(tmp_path / "work", engine="all", output=None))
    assert begun.options.engines == ("ort", "openvino")
    assert begun.options.bundle.name.endswith("-ort-openvino")
    assert list(begun.left_out) == ["trt"]
    assert "pip install" in begun.left_out["trt"]
    assert run(tiny(tmp_path / "work", engine="all", precision="bf16", dry_run=True, json=True)) == 0
    assert json.loads(capsys.readouterr().out)["left_out"]["ort"] == "takes fp32, fp16, int8, not bf16"
    assert run(tiny(tmp_path / "work", engine="all", precision="bf16", dry_run=True)) == 0
    assert "left out ort" in capsys.readouterr().out
    without(monkeypatch, "openvino", "onnxruntime")
    with pytest.raises(Unavailable, match=r"--engine all: none works here: ort: .*pip install.*openvino: .*trt: ") as caught:
        begin(tiny(tmp_path / "work", engine="all"))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("absent", ["openvino", "onnxruntime"])
def test_a_named_engine_that_is_not_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    without(monkeypatch, absent)
    with pytest.raises(Unavailable, match=r"is not installed; install it: pip install") as caught:
        export_bundle(tiny(tmp_path / "work", engine="ort,openvino"))
    assert caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())
