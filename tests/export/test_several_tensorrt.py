"""TensorRT beside engines for a CPU: one plan in two layouts, and gates and budgets of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from export import export_bundle
from export.begin import begin
from export.pipeline import GateFailed
from export.serving.facts import serving_facts
from export.stages import find_plan
from graph_passes import load_model
from graph_passes.analysis.macs import macs_of_graph
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.onnx_io.graph_convert import import_graph, with_shapes
from patchslim.choices import Layout
from patchslim.latency_table import load_table
from tests.helpers.exports import read, tiny
from validate import check_bundle, load_manifest, open_runner
from validate.engine_runs import EngineChoice

pytest.importorskip("openvino")

EVERY = EngineChoice(None)
LAYOUTS: tuple[Layout, ...] = ("split", "packed")


def macs_as_laid(path: Path) -> int:
    """The MACs of one image that the products of an ONNX file take, by the shapes in it."""
    return macs_of_graph(find_structure(import_graph(with_shapes(load_model(path))))).total


@pytest.mark.slow
def test_a_budget_of_macs_is_kept_in_the_layout_of_every_engine(tmp_path: Path) -> None:
    """A narrow model that reads many tokens: what merging them costs as products outweighs the queries that packing costs."""
    pytest.importorskip("tensorrt_rtx")
    model = ("img_size=36", "patch_size=4", "depth=4", "embed_dim=12", "num_heads=3")
    found = {}
    for engines in ("trt", "ort,trt"):
        asked = {"engine": engines, "model_arg": model, "macs_reduction": 0.45, "fit": "none", "calibration_images": 8}
        begun = begin(tiny(tmp_path / "work", target=("sm89",), **asked))
        plan = find_plan(begun.options, begun.source, None, begun.work).plan
        found[engines] = {layout: 1 - plan.macs(layout) / plan.dense_macs() for layout in LAYOUTS}
    assert found["trt"]["packed"] >= 0.45 > found["trt"]["split"] + 0.02  # so one layout does not answer for the other
    assert min(found["ort,trt"].values()) >= 0.45
    assert min(found["ort,trt"].values()) < 0.46  # and no more is dropped than need be


@pytest.mark.slow
@pytest.mark.parametrize("engines", ["ort,openvino,trt", "trt,ort"])
def test_tensorrt_beside_the_engines_for_a_cpu(export_work: Path, engines: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    outcome = export_bundle(tiny(export_work, engines.replace(",", "-"), engine=engines, target=("sm89",)))
    manifest = load_manifest(outcome.bundle)
    trt = manifest.bundled("tensorrt_rtx")
    ort = manifest.bundled("onnxruntime")
    assert trt is not None
    assert ort is not None
    first = engines.startswith("trt")
    packed = "model.onnx" if first else "model.packed.onnx"
    assert trt.onnx == ("model.fp16.onnx" if first else "model.packed.fp16.onnx")
    assert ort.onnx == ("model.split.onnx" if first else "model.onnx")
    assert (trt.macs.layout, ort.macs.layout) == ("packed", "split")
    assert trt.macs.slim > ort.macs.slim
    laid = {one.name: (macs_as_laid(outcome.bundle / fp32), one.macs.slim) for one, fp32 in ((ort, ort.onnx), (trt, packed))}
    assert all(graph == stated for graph, stated in laid.values()), laid
    assert all(one.macs.reduction >= outcome.plan.origin.value for one in manifest.engines)
    assert manifest.macs == (trt if first else ort).macs
    rungs = {rung.stage: rung for rung in manifest.rungs}
    assert rungs[trt.stage].note.startswith("built, not executed")
    assert rungs[trt.stage].status == trt.engine.status == "not executed"
    assert rungs["onnx-slim" if first else "onnx-slim-packed"].status == "passed"
    assert trt.engine.fused_attentions == trt.engine.attentions == 3
    recipe = read(outcome.bundle / "recipe.json")
    assert (recipe["onnx"]["path"], recipe["expected"]["fused_attentions"]) == (trt.onnx, 3)
    facts = serving_facts(manifest)
    assert (facts.runnable, facts.onnx) == (ort.onnx, trt.onnx)
    verdict = check_bundle(outcome.bundle, engines=EVERY)
    assert verdict.exit_code == 0, verdict.faults
    idle = {check.name: check.status for check in verdict.checks if "tensorrt_rtx" in check.name or check.name == "engine ran"}
    assert set(idle.values()) == {"not executed"}
    with open_runner(outcome.bundle) as runner:
        assert runner.engine in ("ort", "openvino")


@pytest.mark.slow
def test_nothing_is_published_where_the_second_engine_fails_a_gate(export_work: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = tiny(
        export_work, "unfused-second", engine="ort,trt", target=("sm89",), precision="fp32", require_fused_attention=True
    )
    with pytest.raises(GateFailed, match="engine-trt: 0 of 3 attentions are one kernel each") as caught:
        export_bundle(options)
    assert caught.value.exit_code == 5
    assert not options.bundle.exists()
    assert load_manifest(caught.value.outcome.bundle).bundled("tensorrt_rtx") is not None


@pytest.mark.slow
def test_a_latency_budget_is_timed_on_the_first_engine(export_work: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = tiny(export_work, "budget", engine="ort,trt", target=("sm89",), latency_reduction=0.2, batch_size=2, fit="none")
    outcome = export_bundle(options)
    table = load_table(outcome.bundle / "latency_table.json")
    assert (table.engine, table.layout) == ("ort", "split")
    assert table.of(outcome.plan.counts) <= 0.8 * table.dense()
    assert check_bundle(outcome.bundle).passed
