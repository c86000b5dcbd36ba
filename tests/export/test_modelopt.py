"""INT8 and FP8 for TensorRT: what ModelOpt quantises, in a graph of another type; stages, gates and refusals of engines."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import export_bundle, modelopt
from export.engines.onnx_info import read_onnx
from export.modelopt import Site
from export.pipeline import GateFailed, missed_by
from patchslim.choices import Precision
from patchslim.errors import InputRejected, Unavailable, UsageError
from tests.helpers.exports import DEPTH, read, stages_in, tiny
from validate import check_bundle
from validate.engine_runs import EngineChoice
from validate.parity import MIN_AGREEMENT

STAGES = ["pytorch", "pytorch-slim", "onnx-slim", "onnx-slim-fp16"]
MISSING = [name for name in ("modelopt", "tensorrt_rtx") if importlib.util.find_spec(name) is None]
INSTALLED = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not installed")
KINDS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}
SITES = [
    Site("first", 0, [0.05], None),
    Site("first", 1, [0.01, 0.02, 0.01], 1),
    Site("second", 0, [0.05], None),
    Site("gone", 0, [0.05], None),
]


def products(kind: int) -> onnx.ModelProto:
    """Two products of one input, each with a weight (4, 3), and their sum."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.uniform(-1, 1, (4, 3)).astype(dtype), name) for name in ("w1", "w2")]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("MatMul", ["x", "w2"], ["b"], name="second"),
        helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
    ]
    ends = [helper.make_tensor_value_info(name, kind, ["n", size]) for name, size in (("x", 4), ("y", 3))]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, kind: int) -> Any:
    import onnxruntime

    x = np.random.default_rng(1).uniform(-3, 3, (5, 4)).astype(helper.tensor_dtype_to_np_dtype(kind))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0].astype(np.float32)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("typed", ["fp32", "fp16"])
def test_sites_are_quantised_in_a_graph_of_any_type(precision: Precision, typed: str) -> None:
    kind = KINDS[typed]
    model = products(kind)
    found = modelopt.quantised_at(model, SITES, precision)
    onnx.checker.check_model(found, full_check=True)
    made = [node for node in found.graph.node if node.op_type == "QuantizeLinear"]
    assert [node.input[0] for node in made] == ["x"]  # once for both products; the weight is stored in 8 bits
    stored = {tensor.name: tensor.data_type for tensor in found.graph.initializer}
    eight = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}[precision]
    assert stored[f"w1.{precision}.values"] == eight
    assert stored["w2"] == stored[f"x.{precision}.scale"] == kind
    assert "w1" not in stored
    exact, error = run(model, kind), np.abs(run(found, kind) - run(model, kind)).max()
    assert 1e-3 < error < 0.25 * np.abs(exact).max()
    assert run(modelopt.quantised_at(model, [], precision), kind).tolist() == exact.tolist()
    again = modelopt.sites_of(found)
    places = [(site.node, site.operand, site.axis) for site in again]
    assert places == [("first", 0, None), ("first", 1, 1), ("second", 0, None)]
    np.testing.assert_allclose(again[1].scale, SITES[1].scale, rtol=1e-3)


def test_int8_values_are_those_of_the_grid() -> None:
    found = modelopt.quantised_at(products(TensorProto.FLOAT), SITES, "int8")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    weight = numpy_helper.to_array(products(TensorProto.FLOAT).graph.initializer[0])
    expected = np.clip(np.rint(weight / np.float32([0.01, 0.02, 0.01])), -127, 127)
    np.testing.assert_array_equal(stored["w1.int8.values"], expected)


def test_sites_are_read_as_they_were_written(tmp_path: Path) -> None:
    modelopt.save_sites(SITES, tmp_path / "sites.json")
    assert modelopt.load_sites((tmp_path / "sites.json").read_text()) == SITES


def test_images_that_are_not_finite_calibrate_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match="a calibration image has values that are NaN or infinite"):
        modelopt.find_sites(tmp_path / "none.onnx", np.full((2, 3, 8, 8), np.nan, dtype=np.float32), "int8")


@pytest.mark.slow
@INSTALLED
def test_what_modelopt_cannot_quantise_is_said_with_its_reason(tmp_path: Path) -> None:
    onnx.save(products(TensorProto.FLOAT), tmp_path / "model.onnx")
    with pytest.raises(InputRejected, match=r"ModelOpt cannot quantise the slim graph: \w+.*use --precision fp16"):
        modelopt.find_sites(tmp_path / "model.onnx", np.zeros((2, 3, 8, 8), dtype=np.float32), "int8")


def test_what_cannot_be_is_refused_before_anything_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    for changes, named in (
        ({"engine": "ort", "precision": "fp8"}, "--precision fp8: ort takes fp32, fp16, int8.*--engine trt for fp8"),
        ({"engine": "trt", "keep_fp32": ("x",)}, "--keep-fp32 is for --precision int8 and fp8"),
        ({"engine": "trt", "precision": "fp8", "latency_reduction": 0.2}, "on single blocks, which fp8 is not made for"),
    ):
        with pytest.raises(UsageError, match=named):
            export_bundle(tiny(work, **changes))
    pytest.importorskip("tensorrt_rtx")
    for target in ("sm80", "portable"):
        with pytest.raises(UsageError, match=f"trt has no fp8 matrix product for {target}: use --precision fp16"):
            export_bundle(tiny(work, engine="trt", precision="fp8", target=("sm89", target)))
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "modelopt" else there(name))
    for precision in ("int8", "fp8"):
        with pytest.raises(
            Unavailable, match=rf"--precision {precision}: ModelOpt is not installed; install it: .*\[modelopt\]"
        ) as missing:
            export_bundle(tiny(work, engine="trt", precision=precision))
        assert missing.value.exit_code == 4
    assert not work.exists() or stages_in(work) == {}


@pytest.mark.slow
@INSTALLED
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_it_is_a_stage_a_file_and_an_engine_of_fused_attentions(export_work: Path, precision: Precision) -> None:
    outcome = export_bundle(
        tiny(export_work, f"trt-{precision}", engine="trt", precision=precision, target=("sm89",), require_fused_attention=True)
    )
    record = read(outcome.bundle / "manifest.json")
    assert [rung["stage"] for rung in record["rungs"]] == [*STAGES, f"onnx-slim-{precision}", "engine"]
    rung = record["rungs"][-2]
    assert (rung["status"], rung["compared_to"]) == ("passed", "onnx-slim")
    assert 1e-3 < rung["max_error"] < 1  # it was really quantised, and ONNX Runtime ran it
    assert record["precision"] == record["engine"]["precision"] == precision
    assert record["engine"]["fused_attentions"] == DEPTH
    assert record["engine"]["narrow_share"] > 0.25
    assert outcome.engine.quantised > 0.5
    assert record["engine"]["files"] == [f"engine/model.{precision}.sm89.engine"]
    file = outcome.bundle / f"model.{precision}.onnx"
    assert read_onnx(file).precision == precision
    assert next(one for one in record["onnx"] if one["path"] == file.name)["min_agreement"] == MIN_AGREEMENT[precision]
    assert outcome.bundle.joinpath("model.fp16.onnx").stat().st_size > 1.2 * file.stat().st_size
    recipe = read(outcome.bundle / "recipe.json")
    assert (recipe["onnx"]["path"], recipe["expected"]["precision"]) == (file.name, precision)
    verdict = check_bundle(outcome.bundle, engines=EngineChoice(None))
    assert verdict.exit_code == 0, verdict.faults
    assert file.name in {run.file for run in verdict.engines}


def spoiled(sites: list[Site], nodes: set[str]) -> list[Site]:
    """``sites`` with the ranges of ``nodes`` a hundred times as wide."""
    return [dataclasses.replace(one, scale=[100 * s for s in one.scale]) if one.node in nodes else one for one in sites]


@pytest.mark.slow
@INSTALLED
def test_the_block_that_loses_most_is_found_and_kept(export_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export import quantization
    from export.bisect import stream_names

    plain = export_bundle(tiny(export_work, "trt-int8", engine="trt", precision="int8", target=("sm89",)))
    parts = quantization.parts_of(onnx.load(plain.bundle / "model.onnx"), stream_names(plain.dense_onnx))
    really = modelopt.find_sites
    monkeypatch.setattr(modelopt, "find_sites", lambda *given: spoiled(really(*given), {*parts["block 1"]}))
    changes: dict[str, Any] = {"engine": "trt", "precision": "int8", "target": ("sm89",), "max_top1_drop": 0.0}
    changes["calibration_images"] = 23  # so that the sites found before are not taken from the work folder
    with pytest.raises(GateFailed, match="onnx-slim-int8: top-1 drops"):
        export_bundle(tiny(export_work, "trt-unmixed", mixed="none", **changes))
    mixed = export_bundle(tiny(export_work, "trt-mixed", mixed="auto", **changes))
    assert list(mixed.kept_parts) == ["block 1"]
    assert 0 < mixed.engine.quantised < plain.engine.quantised
    assert mixed.engine.fused_attentions == DEPTH
    nodes = onnx.load(mixed.bundle / "model.int8.onnx").graph.node
    made = {output for node in nodes if node.op_type == "DequantizeLinear" for output in node.output}
    kept = [node for node in nodes if node.name in parts["block 1"]]
    assert kept
    assert not [node.name for node in kept if made & {*node.input}]


def test_an_engine_without_8_bits_inside_fails(trt_export: Any) -> None:
    options = tiny(Path("work"), engine="trt", precision="int8")
    hollow = dataclasses.replace(trt_export.engine, precision="int8", narrow={"sm89": 0.0}, quantised=1.0)
    assert missed_by(options, hollow) == ["engine: 0% of the tensors between its kernels have 8 bits: it is no int8 engine"]
    for share, quantised in ((0.3, 1.0), (0.03, 0.1), (0.0, 0.0)):  # with most parts kept few tensors can be narrow
        assert missed_by(options, dataclasses.replace(hollow, narrow={"sm89": share}, quantised=quantised)) == []
