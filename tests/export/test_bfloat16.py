"""bfloat16 for TensorRT: a typed ONNX file, its rung run in OpenVINO, an engine whose attentions are fused, and no Turing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest
from onnx import TensorProto

from export import export_bundle
from graph_passes import load_model, to_fp16
from graph_passes.bfloat16 import to_bf16
from patchslim.errors import InputRejected, UsageError
from tests.helpers.exports import DEPTH, read, tiny
from validate import check_bundle
from validate.parity import TOLERANCES

if TYPE_CHECKING:
    from export.pipeline import Outcome

BF16 = TensorProto.BFLOAT16


@pytest.fixture(scope="module")
def outcome(export_work: Path) -> Outcome:
    pytest.importorskip("tensorrt_rtx")
    return export_bundle(tiny(export_work, "bf16", engine="trt", target=("sm89",), precision="bf16", batch="1:2:4"))


def test_the_bundle_says_what_it_is(outcome: Outcome) -> None:
    pytest.importorskip("openvino")
    record = read(outcome.bundle / "manifest.json")
    assert [rung["stage"] for rung in record["rungs"]] == ["pytorch", "pytorch-slim", "onnx-slim", "onnx-slim-bf16", "engine"]
    typed, engine = record["rungs"][-2:]
    assert (typed["status"], typed["tolerance"], engine["status"]) == ("passed", TOLERANCES["bf16"], "not executed")
    assert 1e-4 < typed["max_error"] < typed["tolerance"]
    assert {one["path"]: one["max_error"] for one in record["onnx"]}["model.bf16.onnx"] is None  # not in ONNX Runtime
    assert record["engine"]["fused_attentions"] == DEPTH
    assert record["engine"]["narrow_share"] > 0.7
    recipe = read(outcome.bundle / "recipe.json")
    assert recipe["profiles"] == [{"min": 1, "opt": 2, "max": 4}]
    assert record["target"]["batch"] == [1, 2, 4]
    assert (recipe["onnx"]["path"], recipe["expected"]["precision"]) == ("model.bf16.onnx", "bf16")
    verdict = check_bundle(outcome.bundle)
    assert verdict.exit_code == 0, verdict.faults


def test_all_but_the_embedding_and_each_softmax_is_bfloat16(outcome: Outcome) -> None:
    model = onnx.load(outcome.bundle / "model.bf16.onnx")
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Softmax":
            assert kinds[node.output[0]] == TensorProto.FLOAT
        elif node.op_type in ("MatMul", "LayerNormalization", "Gelu"):
            assert kinds.get(node.output[0], BF16) == BF16, node.name
            assert all(stored.get(name, BF16) == BF16 for name in node.input), node.name
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT}


def test_what_is_not_float32_is_refused(outcome: Outcome) -> None:
    half = to_fp16(load_model(outcome.bundle / "model.onnx"))
    with pytest.raises(InputRejected, match="has weights of 16 bits already"):
        to_bf16(half)
    model = onnx.load(outcome.bundle / "model.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    weight.raw_data = b"\xff" * len(weight.raw_data)  # NaN
    from graph_passes import OnnxModel

    with pytest.raises(InputRejected, match=r"'head\.weight' has values that are NaN or infinite"):
        to_bf16(OnnxModel.from_proto(model))


def test_turing_has_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trt has no bf16 matrix product for sm75: use --precision fp16"):
        export_bundle(tiny(tmp_path / "work", engine="trt", target=("sm75",), precision="bf16"))
