"""Each pass by itself: how many sites it changes, that numbers stay, that a second run changes nothing, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from graph_passes import PASSES, OnnxModel, Settings, run_passes, slim
from graph_passes.pass_registry import GraphPass, graph_pass
from patchslim.choices import Layout, Mode
from patchslim.errors import InputRejected
from patchslim.plan import SlimPlan
from tests.helpers.onnx_models import FORMS, dense, edited_model, ort_logits, plan_for, random_plan, reference, tiny_cnn, traced

pytestmark = pytest.mark.numeric

ALL = list(range(17))
# Block 1 keeps what block 0 left, so in compact mode it needs no cut; the last block keeps the class token only.
KEPT = [[0, 2, 5, 6, 9, 11, 14, 16], [0, 2, 5, 6, 9, 11, 14, 16], [0, 5, 11, 16], [0]]
OF_ANY_GRAPH = ["fold_constants", "expand_attention", "drop_unit_axes", "elide_identities", "fold_norm", "softmax_output"]
ORDER = [
    "fold_constants", "expand_attention", "find_blocks", "repair_reshapes", "fold_scale", "fold_norm", "order_tokens",
    "split_qkv", "cut_tokens", "drop_unit_axes", "elide_identities", "fold_bias", "to_fp16",
]  # fmt: skip
#: Sites of passes that change the same whatever mode and layout are.
OFTEN = {"repair_reshapes": 8, "fold_scale": 4, "order_tokens": 1}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def plan_of(mode: Mode = "compact", kept: list[list[int]] | None = None) -> SlimPlan:
    return plan_for(dense("plain")[0], KEPT if kept is None else kept, mode)


def settings(mode: Mode = "compact", layout: Layout = "split") -> Settings:
    return Settings(plan_of(mode), layout)


@pytest.mark.parametrize(
    ("mode", "layout", "sites"),
    [
        ("compact", "split", {**OFTEN, "cut_tokens": 3, "split_qkv": 3, "fold_norm": 8, "fold_bias": 3, "drop_unit_axes": 9}),
        ("compact", "packed", {**OFTEN, "cut_tokens": 3, "split_qkv": 0, "fold_norm": 0, "fold_bias": 0, "drop_unit_axes": 0}),
        ("stale", "split", {**OFTEN, "cut_tokens": 4, "split_qkv": 4, "fold_norm": 8, "fold_bias": 4, "drop_unit_axes": 12}),
        ("stale", "packed", {**OFTEN, "cut_tokens": 4, "split_qkv": 0, "fold_norm": 0, "fold_bias": 0, "drop_unit_axes": 0}),
    ],
)
def test_sites_numbers_and_second_run_of_every_pass(mode: Mode, layout: Layout, sites: dict[str, int]) -> None:
    model, exported = dense("plain")
    assert [name for name, entry in PASSES.items() if entry.default] == ORDER
    before = exported.SerializeToString()
    current = OnnxModel.from_proto(exported)
    with torch.no_grad():
        uncut = model(IMAGES).numpy()
    wanted = reference(model, plan_of(mode), IMAGES)
    for name in ORDER:
        result = run_passes(current, [name], settings(mode, layout))
        (report,) = result.results
        assert report.refused == []
        if name in sites:
            assert report.sites == sites[name], name
        assert report.modified == (report.sites > 0)
        current = result.model
        onnx.checker.check_model(current.to_proto(), full_check=True)
        assert not (report.modified and current.graph.value_info)
        cut = ORDER.index(name) >= ORDER.index("cut_tokens")
        np.testing.assert_allclose(
            ort_logits(current, IMAGES), wanted if cut else uncut, atol=2e-2 if name == "to_fp16" else 1e-4
        )
        second = run_passes(current, [name], settings(mode, layout))
        assert not second.results[0].modified, name
        assert second.model.to_proto().SerializeToString() == current.to_proto().SerializeToString()
    assert exported.SerializeToString() == before


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_cuts_are_gathers_where_tokens_were_not_ordered(mode: Mode, layout: Layout) -> None:
    model, exported = dense("plain")
    names = [name for name in ORDER[:-1] if name != "order_tokens"]
    result = slim(exported, plan_of(mode), layout=layout, passes=names)
    assert {node.op_type for node in result.model.graph.node if node.name.endswith(".shortcut")} == {"Gather", "Slice"}
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), reference(model, plan_of(mode), IMAGES), atol=1e-4)
    assert not slim(result.model, plan_of(mode), layout=layout).modified


@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_ordered_tokens_are_cut_by_prefix_slices_and_one_gather(mode: Mode) -> None:
    _, exported = dense("plain")
    nodes = slim(exported, plan_of(mode)).model.graph.node
    assert [node.name for node in nodes if node.op_type == "Gather" and "token" in node.name] == ["token_order"]
    assert all(node.op_type == "Slice" for node in nodes if node.name.endswith((".shortcut", ".queries", ".kept", ".dropped")))
    assert sum(node.op_type == "Concat" and "write_back" in node.name for node in nodes) == (3 if mode == "stale" else 0)


def test_a_plan_that_keeps_the_order_needs_no_gather() -> None:
    model, exported = dense("plain")
    plan = plan_of(kept=[ALL, ALL, ALL[:9], [0]])
    result = slim(exported, plan)
    assert {entry.name: entry.sites for entry in result.results} == {
        "fold_constants": 0, "expand_attention": 0, "find_blocks": 0, "repair_reshapes": 8, "fold_scale": 4, "fold_norm": 8,
        "order_tokens": 0, "split_qkv": 2, "cut_tokens": 2, "fold_bias": 2, "drop_unit_axes": 6, "elide_identities": 0,
    }  # fmt: skip
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), reference(model, plan, IMAGES), atol=1e-4)


def test_a_dense_plan_only_folds_into_weights() -> None:
    _, exported = dense("plain")
    result = slim(exported, plan_of(kept=[ALL] * 4))
    assert [entry.name for entry in result.results if entry.modified] == ["fold_scale", "fold_norm"]


def test_equal_inputs_give_equal_bytes() -> None:
    _, exported = dense("registers")
    prefix = list(range(5))
    plan = plan_for(dense("registers")[0], [[*prefix, 7, 9, 20], [*prefix, 7, 20], [*prefix, 7], [0]], "stale")
    first, second = (slim(exported, plan, precision="fp16").model.to_proto().SerializeToString() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", [name for name in PASSES if name not in OF_ANY_GRAPH])
def test_a_cnn_is_refused_by_name_and_left_untouched(name: str) -> None:
    cnn = tiny_cnn()
    before = cnn.SerializeToString()
    result = run_passes(cnn, [name], settings())
    (report,) = result.results
    assert (report.name, report.modified, report.sites) == (name, False, 0)
    assert "no Softmax that weighs values" in report.refused[0].reason
    assert result.model.to_proto().SerializeToString() == cnn.SerializeToString() == before
    with pytest.raises(InputRejected, match=f"pass {name} refused"):
        slim(cnn, plan_of(), passes=[name])


def test_a_pass_that_comes_before_one_it_needs_is_not_registered() -> None:
    with pytest.raises(ValueError, match="pass early comes after late: import it there"):
        graph_pass("early", after=("fold_constants", "late"))
    with pytest.raises(ValueError, match="to_fp16: there is one of this name already"):
        graph_pass("to_fp16")
    assert "early" not in PASSES


def test_a_pass_that_renames_an_output_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(graph: gs.Graph, settings: Settings) -> int:
        graph.outputs[0].name = "answers"
        return 1

    monkeypatch.setitem(PASSES, "rename", GraphPass("rename", "Rename the output.", rename))
    with pytest.raises(RuntimeError, match=r"a bug in pass rename: .*'logits'.*'answers'"):
        run_passes(dense("plain")[1], ["rename"], Settings())


def edited(change: str) -> onnx.ModelProto:
    """The plain export with one thing in it that the passes must not cut through."""
    graph = gs.import_onnx(dense("plain")[1])
    softmax = next(node for node in graph.nodes if node.op == "Softmax")
    if change == "tokens_out":
        graph.outputs.append(next(node for node in graph.nodes if node.op == "Gather").inputs[0])
    elif change == "tapped":
        tap = softmax.outputs[0]
        tap.dtype, tap.shape = np.float32, ("batch", 3, 17, 17)
        graph.outputs.append(tap)
    elif change == "token_mixing_mlp":
        gelu = next(node for node in graph.nodes if node.op == "Gelu")
        out = gs.Variable("mixed", np.float32)
        gelu_out = gelu.outputs[0]
        readers = list(gelu_out.outputs)
        graph.nodes.append(gs.Node("CumSum", "mix", {}, [gelu_out, gs.Constant("one", np.array(1))], [out]))
        for reader in readers:
            reader.inputs[0] = out
    return edited_model(graph)


@pytest.mark.parametrize(
    ("change", "site", "reason"),
    [
        ("tokens_out", "graph output", "the head's answer, not 17 tokens"),
        ("tapped", "graph output", "the head's answer, not 17 tokens"),
        ("token_mixing_mlp", "mix", "an operator that keeps tokens apart"),
    ],
)
def test_what_a_cut_would_break_is_refused_with_node_and_expectation(change: str, site: str, reason: str) -> None:
    model = edited(change)
    result = run_passes(model, ["cut_tokens"], settings())
    assert site in result.results[0].refused[0].site
    assert reason in result.results[0].refused[0].reason
    assert result.model.to_proto() == OnnxModel.from_proto(model).to_proto()


def test_another_plan_on_a_cut_graph_is_refused() -> None:
    _, exported = dense("plain")
    cut = slim(exported, plan_of()).model
    other = plan_of(kept=[KEPT[0], KEPT[0], [0, 5, 11], [0]])
    with pytest.raises(InputRejected, match="already cut to other tokens"):
        slim(cut, other)
    with pytest.raises(InputRejected, match="not in the plan's mode"):
        slim(cut, plan_of("stale"))
    with pytest.raises(InputRejected, match="already cut to other tokens"):
        slim(cut, plan_of(kept=[ALL] * 4))
    assert not slim(cut, plan_of(), layout="packed").modified  # the cuts are there: how they are laid stays as it is


def test_a_weight_too_large_for_fp16_is_refused() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(dense("plain")[1])
    tensor = next(t for t in model.graph.initializer if t.name == "head.weight")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0, 0] = 7e4
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    with pytest.raises(InputRejected, match=r"head\.weight.*70000 does not fit float16"):
        slim(model, plan_of(), precision="fp16")


def test_fp16_is_typed_with_float_ends_and_safe_norms_and_softmaxes() -> None:
    model = slim(dense("plain")[1], plan_of(), precision="fp16").model.to_proto()
    assert [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)] == [onnx.TensorProto.FLOAT] * 2
    assert not [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    kinds = {
        v.name: v.type.tensor_type.elem_type
        for v in onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph.value_info
    }
    for node in model.graph.node:
        if node.op_type == "Softmax":
            assert kinds[node.output[0]] == onnx.TensorProto.FLOAT
        elif node.op_type == "LayerNormalization":
            assert {a.name: a.i for a in node.attribute}["stash_type"] == 1
            assert kinds[node.output[0]] == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize("form", ["gather", "split"])
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_other_ways_to_unpack_qkv(form: str, layout: Layout) -> None:
    graph = gs.import_onnx(dense("plain")[1])
    for number, packed in enumerate(node for node in list(graph.nodes) if node.attrs.get("perm") == [2, 0, 3, 1, 4]):
        source, slices = packed.outputs[0], list(packed.outputs[0].outputs)
        slices.sort(key=lambda node: int(node.inputs[1].values[0]))
        parts = [gs.Variable(f"part_{number}_{i}", np.float32) for i in range(3)]
        if form == "split":
            graph.nodes.append(gs.Node("Split", f"split_{number}", {"axis": 0, "num_outputs": 3}, [source], parts))
        for i, node in enumerate(slices):
            squeeze = node.outputs[0].outputs[0]
            if form == "gather":
                out = squeeze.outputs[0]
                squeeze.outputs.clear()
                entry = gs.Constant(f"entry_{number}_{i}", np.array(i))
                graph.nodes.append(gs.Node("Gather", f"gather_{number}_{i}", {"axis": 0}, [source, entry], [out]))
            else:
                squeeze.inputs[0] = parts[i]
            node.inputs.clear()
    model = edited_model(graph)
    result = slim(model, plan_of(), layout=layout)
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), reference(dense("plain")[0], plan_of(), IMAGES), atol=1e-4)
    assert not slim(result.model, plan_of(), layout=layout).modified


def test_names_that_the_model_already_uses_are_not_merged() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(dense("plain")[1])
    taken = {"head.weight": "block_0.qkv.weight", "pos_embed": "block_2.kv.weight"}
    for tensor in model.graph.initializer:
        tensor.name = taken.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [taken.get(name, name) for name in node.input]
    del model.graph.value_info[:]
    expected = reference(dense("plain")[0], plan_of(), IMAGES)
    np.testing.assert_allclose(ort_logits(slim(model, plan_of()).model, IMAGES), expected, atol=1e-4)


@pytest.mark.parametrize("make", [traced, pytest.param(dense, marks=pytest.mark.slow)], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=[] if form in ("packed_gated_mlp", "norms_inside") else pytest.mark.slow) for form in FORMS],
)
def test_forms_of_the_block_that_timm_offers(form: str, make: Any) -> None:
    model, exported = make(form)
    for seed, mode in enumerate(("compact", "stale")):
        plan = random_plan(model, seed, mode)
        split, packed = (slim(exported, plan, layout=layout).model for layout in ("split", "packed"))
        expected = reference(model, plan, IMAGES)
        np.testing.assert_allclose(ort_logits(split, IMAGES), expected, atol=1e-4)
        np.testing.assert_allclose(ort_logits(packed, IMAGES), expected, atol=1e-4)
