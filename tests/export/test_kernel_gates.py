"""Gates on what an engine says of itself: every attention fused where that is asked for, and FP16 that is FP16."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch

from export import export_bundle
from export.engines.base import EngineResult
from export.pipeline import GateFailed, missed_by
from export.summary import as_json
from patchslim.choices import EngineName
from patchslim.errors import Unavailable, UsageError
from tests.helpers.exports import ARGUMENTS, DEPTH, MODEL, read, tiny

if TYPE_CHECKING:
    from export.pipeline import Outcome


def test_what_the_kernels_show_is_in_the_manifest(trt_export: Outcome) -> None:
    engine = read(trt_export.bundle / "manifest.json")["engine"]
    assert engine["fused_attentions"] == DEPTH
    assert engine["narrow_share"] == trt_export.engine.narrow["sm89"] > 0.8
    assert missed_by(tiny(Path("work"), engine="trt", require_fused_attention=True), trt_export.engine) == []


def test_the_dense_model_is_built_beside_the_slim_one(trt_export: Outcome) -> None:
    """Its kernels, by the same builder, for the first target: the evidence of what a cut costs or saves there."""
    engine, built = trt_export.engine, as_json(trt_export)["engine"]
    assert engine.dense_kernels.keys() == {"sm89"} <= engine.kernels.keys()
    assert 0.5 < engine.kernels["sm89"] / engine.dense_kernels["sm89"] < 2
    assert (built["kernels"], built["dense_kernels"]) == (engine.kernels, engine.dense_kernels)
    assert f"{engine.kernels['sm89']} kernels ({engine.dense_kernels['sm89']} dense)" in engine.summary()
    page = (trt_export.bundle / "report.html").read_text()
    assert f"<td>{engine.kernels['sm89']}</td><td>{engine.dense_kernels['sm89']}</td>" in page


@pytest.mark.slow
def test_a_dense_model_that_cannot_be_built_fails_nothing(
    export_work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from export.engines import build

    calls, real = list[Path](), build.build_engine

    def once(kind: EngineName, onnx: Path, *places: Path, **options: Any) -> EngineResult:
        calls.append(onnx)
        if len(calls) > 1:
            raise Unavailable(f"{onnx.name}: TensorRT-RTX did not build it for sm86: out of memory")
        return real(kind, onnx, *places, **options)

    monkeypatch.setattr(build, "build_engine", once)
    outcome = export_bundle(tiny(export_work, "dense-fails", engine="trt", target=("sm86",)))
    assert len({*calls}) == 2
    said = capsys.readouterr().err
    assert "warning: the dense model was not built, so its kernels are not known: model.fp16.onnx: TensorRT-RTX did not" in said
    assert (outcome.engine.kernels.keys(), outcome.engine.dense_kernels) == ({"sm86"}, {})
    assert as_json(outcome)["engine"]["dense_kernels"] == {}
    assert (outcome.bundle / "manifest.json").is_file()


def test_attentions_that_are_not_fused_fail_where_that_is_asked_for(export_work: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    asked = tiny(export_work, "unfused", engine="trt", target=("sm89",), precision="fp32", require_fused_attention=True)
    with pytest.raises(GateFailed, match=f"0 of {DEPTH} attentions are one kernel each") as caught:
        export_bundle(asked)
    assert caught.value.exit_code == 5
    assert not asked.bundle.exists()


def test_what_is_not_known_or_not_fp16_fails(trt_export: Outcome) -> None:
    options = tiny(Path("work"), engine="trt", require_fused_attention=True)
    silent = dataclasses.replace(trt_export.engine, fused={}, narrow={})
    assert missed_by(options, silent) == [
        "engine: it is not known which attentions are one kernel each, and --require-fused-attention asks for all"
    ]
    assert missed_by(tiny(Path("work"), engine="trt"), silent) == []
    wide = dataclasses.replace(trt_export.engine, narrow={"sm89": 0.1})
    assert missed_by(options, wide) == ["engine: 10% of the tensors between its kernels have 16 bits: it is no fp16 engine"]


def test_an_fp16_overflow_is_named(export_work: Path, tmp_path: Path) -> None:
    arguments = {key: int(value) for key, _, value in (pair.partition("=") for pair in ARGUMENTS)}
    model = timm.create_model(MODEL, num_classes=10, **arguments)
    weights = model.state_dict()
    weights["blocks.1.mlp.fc1.weight"] *= 6e5  # what it gives is beyond 65504, and itself is not
    weights["blocks.1.mlp.fc2.weight"] *= 2e-6
    torch.save(weights, tmp_path / "weights.pth")
    options = tiny(export_work, "overflow", weights=str(tmp_path / "weights.pth"), precision="fp16", dense=True)
    with pytest.raises(GateFailed, match=r"node '.*' gives \d.* on the golden images; float16 ends at 65504.*--precision bf16"):
        export_bundle(options)


def test_other_engines_do_not_say_what_they_fused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--require-fused-attention needs --engine trt"):
        export_bundle(tiny(tmp_path / "work", require_fused_attention=True))
