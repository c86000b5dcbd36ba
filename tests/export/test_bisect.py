"""``--bisect``: the first block that differs is named, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export import export_bundle
from export.bisect import Bisection, BlockDifference, bisect, in_plan_order, stream_names, torch_streams
from export.summary import as_json
from patchslim.errors import InputRejected
from patchslim.plan import load_plan
from slimming.models.slim_vit import SlimViT
from tests.helpers.exports import DEPTH, tiny

if TYPE_CHECKING:
    from export.pipeline import Outcome


@pytest.fixture(scope="module")
def found(export_work: Path) -> Outcome:
    """An export with merges, whose stages were compared."""
    return export_bundle(tiny(export_work, "bisected", bisect=True, precision="fp16"))


def test_stages_that_are_right_differ_nowhere(found: Outcome) -> None:
    assert [(each.stage, each.before) for each in found.bisections] == [
        ("onnx-slim", "pytorch-slim"),
        ("onnx-slim-fp16", "onnx-slim"),
    ]
    for each in found.bisections:
        assert each.first is None
        assert [one.block for one in each.blocks] == list(range(DEPTH + 1))
        assert "every block is within its tolerance" in str(each)
    fp32, fp16 = (max(one.max_error or 0 for one in each.blocks) for each in found.bisections)
    assert 0 < fp32 < 1e-4 < fp16 < 0.1
    assert [each["first"] for each in as_json(found)["bisections"]] == [None, None]


@pytest.mark.parametrize("broken", [1, 2])
def test_the_block_that_was_broken_is_named(found: Outcome, tmp_path: Path, broken: int) -> None:
    bundle = found.bundle
    names = stream_names(found.dense_onnx)
    model = onnx.load(bundle / "model.onnx")
    makers = {output: node for node in model.graph.node for output in node.output}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    waiting, seen = [names[broken]], set()
    while True:  # from the block's output back to the nearest weights, which are its MLP's
        node = makers[waiting.pop(0)]
        if given := [name for name in node.input if name in weights and len(weights[name].dims) == 2]:
            tensor = weights[given[0]]
            tensor.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(tensor), tensor.name))
            break
        waiting += [name for name in node.input if name in makers and name not in seen]
        seen.update(node.input)
    onnx.save(model, tmp_path / "broken.onnx")
    golden = np.load(bundle / "golden.npz")["inputs"]
    result = bisect(found.dense_onnx, {"onnx-slim": tmp_path / "broken.onnx"}, lambda: reference(found), golden)
    assert result[0].first == broken
    assert f"block {broken} is " in str(result[0])


def reference(found: Outcome) -> SlimViT:
    """What the export measured as pytorch-slim, with fitted weights read back from its dense graph's own export."""
    from slimming.fitting.fitted_weights import load_fitted
    from slimming.session import open_session

    options = tiny(found.dense_onnx.parents[1])
    plans = {path: load_plan(path) for path in found.dense_onnx.parents[1].glob("plan-*/plan.json")}
    path, plan = next((path, plan) for path, plan in plans.items() if plan == found.plan)
    return SlimViT(load_fitted(plan, path, open_session(options).loaded.module), plan).eval()


def test_the_reference_walks_the_blocks_that_it_answers_with(found: Outcome) -> None:
    module, images = reference(found), np.load(found.bundle / "golden.npz")["inputs"]
    streams = torch_streams(module, images)
    assert [stream.shape[1] for stream in streams] == [found.plan.tokens, *found.plan.counts]
    with torch.inference_mode():
        head: Any = module.model
        assert torch.allclose(
            head.head(head.norm(torch.from_numpy(streams[-1]))[:, 0]), module(torch.from_numpy(images)), atol=1e-5
        )


def test_sorted_tokens_are_put_back(found: Outcome) -> None:
    streams = torch_streams(reference(found), np.load(found.bundle / "golden.npz")["inputs"])
    rng = np.random.default_rng(0)
    mixed = [stream[:, rng.permutation(stream.shape[1])] for stream in streams]
    assert not np.array_equal(mixed[0], streams[0])
    for again, stream in zip(in_plan_order(mixed, streams), streams, strict=True):
        assert np.array_equal(again, stream)


def test_a_block_that_is_not_finite_is_named() -> None:
    result = Bisection("b", "a", [BlockDifference(0, 0.0, 1.0), BlockDifference(1, None, 1.0)])
    assert result.first == 1
    assert str(result) == "b against a: block 1 is not finite, and is the first"


def test_a_graph_without_blocks_is_refused(tmp_path: Path) -> None:
    info = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    node = onnx.helper.make_node("Relu", ["image"], ["out"])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    graph = onnx.helper.make_graph([node], "no-vit", [info], [out])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), tmp_path / "no.onnx"
    )
    with pytest.raises(InputRejected, match="not a Vision Transformer that the passes understand"):
        stream_names(tmp_path / "no.onnx")
