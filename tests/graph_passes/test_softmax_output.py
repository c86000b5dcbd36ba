"""Probabilities instead of logits: the right ones, once, in float32, and refused where there are no logits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from graph_passes import Settings, run_passes
from tests.helpers.onnx_models import dense, ort_logits

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("passes", [["softmax_output"], ["to_fp16", "softmax_output"], ["softmax_output", "to_fp16"]])
def test_rows_are_the_softmax_of_the_logits(passes: list[str]) -> None:
    exported = dense("plain")[1]
    result = run_passes(exported, passes, Settings())
    assert {entry.name: entry.sites for entry in result.results}["softmax_output"] == 1
    logits = ort_logits(exported, IMAGES).astype(np.float64)
    wanted = np.exp(logits - logits.max(1, keepdims=True))
    wanted /= wanted.sum(1, keepdims=True)
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), wanted, atol=1e-5 if passes[0] == passes[-1] else 2e-3)
    (value,) = result.model.graph.output
    assert (value.name, value.type.tensor_type.elem_type) == ("logits", TensorProto.FLOAT)
    again = run_passes(result.model, passes, Settings())
    assert not again.modified
    assert [entry.refused for entry in again.results if entry.refused] == []


def test_behind_to_fp16_they_are_computed_in_float32() -> None:
    graph = run_passes(dense("plain")[1], ["to_fp16", "softmax_output"], Settings()).model.graph
    producer = {name: node for node in graph.node for name in node.output}
    last = producer["logits"]
    assert (last.op_type, producer[last.input[0]].op_type) == ("Softmax", "Cast")


@pytest.mark.parametrize(("change", "fault"), [("two", "2 graph outputs"), ("flat", "two axes")])
def test_other_outputs_are_refused(change: str, fault: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(dense("plain")[1])
    old = model.graph.output[0].name
    op, attributes = ("Identity", {}) if change == "two" else ("ReduceMax", {"keepdims": 0})
    model.graph.node.append(helper.make_node(op, [old], ["other"], **attributes))
    shape = [] if change == "flat" else [None, None]
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, shape))
    if change == "flat":
        del model.graph.output[0]
    result = run_passes(model, ["softmax_output"], Settings())
    (refusal,) = result.results[0].refused
    assert fault in f"{refusal.site}: {refusal.reason}"
    assert not result.modified
