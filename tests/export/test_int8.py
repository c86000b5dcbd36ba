"""INT8: quantised by NNCF, measured as a stage of its own, kept out of as few blocks as need be, refused where it cannot be."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import export_bundle, quantization
from export.bisect import stream_names
from export.pipeline import GateFailed
from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.ort_runner import OrtRunner
from tests.helpers.exports import EVALUATION, read, stages_in, tiny
from validate import check_bundle
from validate.engine_runs import EngineChoice
from validate.parity import MIN_AGREEMENT, TOLERANCES

pytest.importorskip("nncf")
pytest.importorskip("openvino")
from patchslim.openvino_runner import computes_bfloat16

if TYPE_CHECKING:
    from export.pipeline import Outcome

STAGES = ["pytorch", "pytorch-slim", "onnx-slim", "onnx-slim-int8", "engine"]


@pytest.fixture(scope="module")
def outcome(export_work: Path) -> Outcome:
    return export_bundle(tiny(export_work, "int8", engine="openvino", precision="int8"))


def models(outcome: Outcome) -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, list[str]]]:
    """The float32 and the INT8 graph of a bundle, and the nodes of its parts."""
    original, quantised = (onnx.load(outcome.bundle / name) for name in ("model.onnx", "model.int8.onnx"))
    return original, quantised, quantization.parts_of(original, stream_names(outcome.dense_onnx))


def answers(model: onnx.ModelProto) -> Any:
    images = np.random.default_rng(0).standard_normal((4, 3, 48, 48)).astype(np.float32)
    with OrtRunner(model.SerializeToString(), threads=1) as runner:
        return runner.infer(images)


@pytest.mark.slow
def test_it_is_a_stage_and_a_file_of_its_own(outcome: Outcome) -> None:
    record = read(outcome.bundle / "manifest.json")
    assert [rung["stage"] for rung in record["rungs"]] == STAGES
    typed, engine = record["rungs"][-2:]
    assert (typed["compared_to"], engine["compared_to"]) == ("onnx-slim", "onnx-slim-int8")
    for rung in (typed, engine):
        assert (rung["images"], rung["status"], rung["tolerance"]) == (EVALUATION, "passed", TOLERANCES["int8"])
    assert 1e-3 < typed["max_error"] < 0.3  # it was really quantised
    assert record["precision"] == record["engine"]["precision"] == "int8"
    assert record["engine"]["settings"]["INFERENCE_PRECISION_HINT"] == ("bf16" if computes_bfloat16() else "f32")
    assert record["engine"]["files"] == ["engine/model.int8.xml", "engine/model.int8.bin"]
    files = {one["path"]: one for one in record["onnx"]}
    assert files["model.int8.onnx"]["min_agreement"] == MIN_AGREEMENT["int8"]
    assert (record["kept_parts"], record["precision_trials"]) == ([], [])
    assert record["tools"]["nncf"] == importlib.metadata.version("nncf")
    recipe = read(outcome.bundle / "recipe.json")
    assert (recipe["onnx"]["path"], recipe["expected"]["precision"]) == ("model.onnx", "fp32")
    verdict = check_bundle(outcome.bundle, engines=EngineChoice(None))
    assert verdict.exit_code == 0, verdict.faults
    assert {run.file for run in verdict.engines} == {"model.onnx", "model.int8.onnx", "engine/model.int8.xml"}


@pytest.mark.slow
def test_weights_are_int8_but_for_the_merges(outcome: Outcome) -> None:
    original, quantised, _ = models(outcome)
    count, whole = quantization.quantised_products(quantised)
    assert 0 < count < whole
    stored = {tensor.name: tensor.data_type for tensor in quantised.graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 for kind in stored.values()) >= 4 * 3  # qkv, projection and MLP of three blocks
    made = {output for node in quantised.graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    for node in quantised.graph.node:
        if node.name.endswith(".merged"):
            assert not made & set(node.input), node.name
        elif node.op_type == "Conv":
            assert len(made & set(node.input)) == 2, node.name  # images and weights
    assert {entry.key for entry in quantised.metadata_props} >= {"model", "plan_sha256"}
    assert [node.name for node in original.graph.node if node.name not in {one.name for one in quantised.graph.node}] == []


@pytest.mark.slow
def test_what_is_restored_answers_as_before(outcome: Outcome) -> None:
    original, quantised, parts = models(outcome)
    everything = [node.name for node in original.graph.node]
    whole = quantization.restore(quantised, original, everything)
    np.testing.assert_array_equal(answers(whole), answers(original))
    assert quantization.quantised_products(whole)[0] == 0
    assert len(whole.graph.node) == len(original.graph.node)
    some = quantization.restore(quantised, original, parts["block 2"])
    onnx.checker.check_model(some)
    assert 0 < quantization.quantised_products(some)[0] < quantization.quantised_products(quantised)[0]
    assert not np.array_equal(answers(some), answers(quantised))


def damaged(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """``model`` with a scale of the activations that ``names`` read a hundred times as coarse."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    made = {output: node for node in result.graph.node for output in node.output}
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    for node in result.graph.node:
        source = made.get(node.input[0]) if node.name in names and node.op_type == "MatMul" else None
        if source is not None and source.op_type == "DequantizeLinear":
            scale = tensors[source.input[1]]
            scale.CopyFrom(numpy_helper.from_array(100 * numpy_helper.to_array(scale), scale.name))
    return result


@pytest.mark.slow
def test_the_block_that_loses_most_is_found_and_kept(
    outcome: Outcome, export_work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, quantised, parts = models(outcome)
    blocks = {title: names for title, names in parts.items() if title.startswith("block")}
    bad = damaged(quantised, parts["block 1"])
    assert quantization.rank_parts(bad, original, blocks, answers)[0] == "block 1"
    really = quantization.quantize

    def quantize(*given: Any) -> onnx.ModelProto:
        return damaged(really(*given), parts["block 1"])

    monkeypatch.setattr(quantization, "quantize", quantize)
    changes: dict[str, Any] = {"engine": "ort", "precision": "int8", "keep_fp32": ("nothing|node_Shape",), "max_top1_drop": 0.0}
    with pytest.raises(GateFailed, match="onnx-slim-int8: top-1 drops"):
        export_bundle(tiny(export_work, "unmixed", mixed="none", **changes))
    mixed = export_bundle(tiny(export_work, "mixed", mixed="auto", **changes))
    assert list(mixed.kept_parts) == read(mixed.bundle / "manifest.json")["kept_parts"] == ["block 1"]
    assert mixed.engine.precision == "int8"
    assert check_bundle(mixed.bundle).passed


@pytest.mark.slow
def test_nodes_are_kept_by_name(export_work: Path) -> None:
    outcome = export_bundle(tiny(export_work, "kept", engine="ort", precision="int8", keep_fp32=(r"^node_matmul", "linear")))
    assert "same run as onnx-slim-int8" in outcome.parity.rungs[-1].note
    graph = onnx.load(outcome.bundle / "model.int8.onnx").graph
    made = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    assert not [node.name for node in graph.node if node.name.startswith("node_matmul") and made & set(node.input)]
    with pytest.raises(UsageError, match=r"--keep-fp32 nowhere: matches no node"):
        export_bundle(tiny(export_work, "vain", engine="ort", precision="int8", keep_fp32=("nowhere",)))


@pytest.mark.slow
def test_the_fastest_precision_that_passes_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"fp32": 3.0, "bf16": 1.0, "int8": 2.0}  # in the order in which they are tried

    def interleaved(runs: list[Any], rounds: int, **_: Any) -> list[list[float]]:
        assert all(run() > 0 for run in runs)
        tried = list(seconds.values()) if len(runs) == 3 else [seconds["fp32"], seconds["int8"]]
        return [tried] * rounds

    monkeypatch.setattr("export.engine_times.interleaved", interleaved)
    outcome = export_bundle(tiny(tmp_path / "work", "auto", engine="openvino"))  # where nothing was timed before
    best = "bf16" if computes_bfloat16() else "int8"
    assert outcome.engine.precision == best
    trials = {trial.precision: trial for trial in outcome.trials}
    assert [name for name, trial in trials.items() if trial.chosen] == [best]
    assert trials["fp32"].note == f"{3 / seconds[best]:.2f} times as long as {best} on this machine"
    assert trials["int8"].status == "passed"
    assert [trial["precision"] for trial in read(outcome.bundle / "manifest.json")["precision_trials"]] == list(trials)


def test_what_cannot_be_is_refused_before_anything_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    for changes, named in (
        ({"engine": "openvino", "precision": "fp8"}, "--precision fp8: openvino takes fp32, bf16, int8"),
        ({"engine": "ort", "precision": "auto"}, "--precision auto is for --engine openvino"),
        ({"engine": "ort", "keep_fp32": ("x",)}, "--keep-fp32 is for --precision int8 and fp8"),
        ({"engine": "ort", "precision": "int8", "keep_fp32": ("(",)}, r"--keep-fp32 \(: is no regular expression"),
        ({"engine": "ort", "precision": "int8", "latency_reduction": 0.2}, "a latency budget is timed on single blocks"),
        ({"engine": "openvino", "precision": "auto", "latency_reduction": 0.2}, "a latency budget is timed on single blocks"),
        ({"engine": "openvino", "batch": "1:4:8"}, "--batch 1:4:8 needs --engine trt"),
        ({"engine": "trt", "batch": "4:2:8"}, "--batch 4:2:8: needs 1 <= MIN <= USUAL <= MAX"),
        ({"engine": "trt", "batch": "many"}, "--batch many: must be MIN:USUAL:MAX"),
        ({"engine": "trt", "batch": "1,1:8:4"}, "--batch 1,1:8:4: needs 1 <= MIN <= USUAL <= MAX"),
        ({"engine": "trt", "batch": "1,1:1:1"}, "--batch 1,1:1:1: a profile is given twice"),
        ({"engine": "trt", "batch": ("1", "1:8:4")}, "--batch 1,1:8:4: needs 1 <= MIN <= USUAL <= MAX"),
        ({"engine": "trt", "batch": ("2", "1,2:2:2")}, "--batch 2,1,2:2:2: a profile is given twice"),
        ({"engine": "trt", "batch": ("1", "")}, "--batch 1,: must be MIN:USUAL:MAX"),
        ({"engine": "ort", "batch": ("1", "2")}, "--batch 1,2 needs --engine trt"),
        ({"engine": "trt", "batch": "1,2,3,4,5,6,7,8,9"}, "at most 8 profiles"),
        ({"engine": "ort", "workspace": 64}, "--workspace 64 needs --engine trt"),
        ({"engine": "ort", "optimization_level": 5}, "--optimization-level 5 needs --engine trt"),
        ({"engine": "trt", "workspace": 0}, "--workspace 0: must be from 1 to 1048576 MiB"),
        ({"engine": "trt", "optimization_level": 6}, "--optimization-level 6: must be from 0 to 5"),
        ({"engine": "ort", "refit": True}, "--refit needs --engine trt"),
        ({"engine": "ort,openvino", "strip_weights": True}, "--strip-weights needs --engine trt"),
    ):
        with pytest.raises(UsageError, match=named):
            export_bundle(tiny(work, **changes))
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else there(name))
    with pytest.raises(Unavailable, match=r"--precision int8: NNCF is not installed; install it: pip install .*\[nncf\]"):
        export_bundle(tiny(work, engine="openvino", precision="int8"))
    assert not work.exists() or stages_in(work) == {}


def test_without_nncf_the_choice_is_among_the_rest(export_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else there(name))
    outcome = export_bundle(tiny(export_work, "auto-without", engine="openvino"))
    trials = {trial.precision: trial for trial in outcome.trials}
    assert (trials["int8"].status, trials["int8"].chosen) == ("not executed", False)
    assert "NNCF is not installed; install it" in trials["int8"].note
    assert outcome.engine.precision in ("fp32", "bf16")


def test_images_that_are_not_finite_calibrate_nothing() -> None:
    model = onnx.ModelProto()
    with pytest.raises(InputRejected, match="a calibration image has values that are NaN or infinite"):
        quantization.quantize(model, np.full((2, 3, 8, 8), np.nan, dtype=np.float32))
