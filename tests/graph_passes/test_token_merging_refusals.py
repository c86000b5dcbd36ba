"""Merging that cannot be done: each graph and plan is refused by the node that stands in the way."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import Tensor, nn

from graph_passes import Settings, run_passes, slim
from patchslim.choices import Layout
from patchslim.errors import InputRejected
from slimming.api import make_plan
from tests.helpers.corpus import built, by_name
from tests.helpers.corpus.models import torch_model
from tests.helpers.merging import KEPT, merges_of, plan_of
from tests.helpers.onnx_models import dense, edited_model, tiny_vit, trace


class Together(nn.Module):
    """An attention that does something to queries and keys stacked on each other."""

    def __init__(self, attention: Any, change: nn.Module) -> None:
        super().__init__()
        self.attention, self.change = attention, change

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        batch, count, width = tokens.shape
        packed = self.attention.qkv(tokens).reshape(batch, count, 3, 3, width // 3).permute(2, 0, 3, 1, 4)
        queries_keys = self.change(packed[:2])
        weights = (queries_keys[0] @ queries_keys[1].transpose(-2, -1)).softmax(-1)
        result: Tensor = self.attention.proj((weights @ packed[2]).transpose(1, 2).reshape(batch, count, width))
        return result


class PerToken(nn.Module):
    """A factor for each token, as rotary tables are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.randn(17, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.factor


@pytest.mark.parametrize(
    ("make", "site", "reason"),
    [
        (lambda: nn.LayerNorm(16), "LayerNormalization node", "linear layers and at most one norm"),
        (nn.Tanh, "Tanh node", "linear layers and at most one norm"),
        (PerToken, "Mul node", "it has a row for each"),
    ],
)
def test_what_does_not_commute_with_a_mean_is_refused_by_node(make: Callable[[], nn.Module], site: str, reason: str) -> None:
    model = tiny_vit(depth=2)
    for block in model.blocks:
        block.attn = Together(block.attn, make())
    graph, kept = trace(model), [KEPT[0], [0]]
    settings = Settings(make_plan(tiny_vit(depth=2), "tiny", kept, merged_into=merges_of(kept, 17, 1, random.Random(0))))
    folded = run_passes(graph, ["fold_constants"], settings).model
    result = run_passes(folded, ["cut_tokens"], settings)
    (refusal,) = result.results[0].refused
    assert refusal.site.startswith(site)
    assert reason in refusal.reason
    assert not result.modified
    assert slim(graph, make_plan(tiny_vit(depth=2), "tiny", kept)).modified  # it is the merging that cannot be done


def test_an_attention_node_is_expanded_first_or_refused() -> None:
    case = built(by_name("timm_class-dynamo23"))
    kept = [[0, 1, 2, 3], [0, 1], [0]]
    plan = make_plan(torch_model("timm_class", True), "tiny", kept, merged_into=merges_of(kept, 17, 1, random.Random(0)))
    result = run_passes(case.model, ["fold_constants", "cut_tokens"], Settings(plan))
    (refusal,) = result.results[1].refused
    assert refusal.site.startswith("Attention node")
    assert "expand_attention first" in refusal.reason


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_graph_that_was_cut_otherwise_is_refused(layout: Layout) -> None:
    graph = dense("plain")[1]
    merged, lost = (slim(graph, plan, layout=layout).model for plan in (plan_of(), plan_of(merged_into=None)))
    for model, plan, message in [
        (lost, plan_of(), "block 0: already cut without merging; the plan merges the dropped tokens"),
        (merged, plan_of(merged_into=None), "merged already, and the plan drops them without merging"),
        (merged, plan_of(seed=1), "merged already, but not as the plan says"),
        (merged, plan_of([KEPT[0], [0, 5], [0, 5], [0]]), "already cut to other tokens"),
    ]:
        with pytest.raises(InputRejected, match=message):
            slim(model, plan, layout=layout)


def sums_of(graph: gs.Graph) -> tuple[gs.Node, gs.Node, gs.Node]:
    """The Gather, the Mul and the ReduceSum of the first merge."""
    name = "block_0.shortcut"
    by_name = {node.name: node for node in graph.nodes}
    return by_name[f"{name}.terms"], by_name[f"{name}.weighed"], by_name[f"{name}.merged"]


def heavier(terms: gs.Node, weighed: gs.Node, merged: gs.Node) -> None:
    weighed.inputs[1].values = weighed.inputs[1].values * 2


def unweighed(terms: gs.Node, weighed: gs.Node, merged: gs.Node) -> None:
    merged.inputs[0] = terms.outputs[0]


def computed(terms: gs.Node, weighed: gs.Node, merged: gs.Node) -> None:
    weighed.inputs[1] = weighed.inputs[0]


def by_feature(terms: gs.Node, weighed: gs.Node, merged: gs.Node) -> None:
    weighed.inputs[1].values = np.tile(weighed.inputs[1].values, (1, 1, 48))  # the model's width


def alike(terms: gs.Node, weighed: gs.Node, merged: gs.Node) -> None:
    weighed.inputs[1].values = weighed.inputs[1].values[:, :1]


def normed(terms: gs.Node, weighed: gs.Node, merged: gs.Node) -> None:
    weighed.op = "Div"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (heavier, "merged already, but not as the plan says"),
        (unweighed, "expected a sum of rows that a constant table takes, each times a constant"),
        (computed, "expected a sum of rows that a constant table takes, each times a constant"),
        (by_feature, "expected one weight for each of"),
        (alike, "expected one weight for each of"),
        (normed, "expected rows of tokens that a table takes to be weighed and summed"),
    ],
)
def test_sums_of_tokens_that_no_plan_lays_are_refused(change: Callable[..., None], reason: str) -> None:
    graph = gs.import_onnx(slim(dense("plain")[1], plan_of(), layout="packed").model.to_proto())
    change(*sums_of(graph))
    with pytest.raises(InputRejected, match=reason):
        slim(edited_model(graph), plan_of(), layout="packed")


def test_a_graph_whose_own_tokens_are_mixed_is_refused_by_node() -> None:
    graph = gs.import_onnx(dense("plain")[1])
    norm = next(node for node in graph.nodes if node.op == "LayerNormalization")
    stream = norm.inputs[0]
    product, total = (gs.Variable(f"own_{name}", np.float32) for name in ("product", "total"))
    matrix = gs.Constant("own_matrix", np.full((17, 17), 1 / 17, np.float32))
    readers = list(stream.outputs)
    graph.nodes.append(gs.Node("MatMul", "own_mix", {}, [matrix, stream], [product]))
    graph.nodes.append(gs.Node("Add", "own_add", {}, [stream, product], [total]))
    for reader in readers:
        reader.inputs = [total if tensor is stream else tensor for tensor in reader.inputs]
    model = edited_model(graph)
    for name in ("order_tokens", "cut_tokens"):
        for plan in (plan_of(), plan_of(merged_into=None)):
            (refusal,) = run_passes(model, [name], Settings(plan)).results[0].refused
            assert "own_mix" in refusal.site
            assert "this matrix mixes them" in refusal.reason


def test_the_plan_itself_rejects_merges_for_a_head_that_pools() -> None:
    with pytest.raises(ValueError, match="merged_into: goes with mode compact and a head that reads single tokens"):
        plan_of(pooling="avg", head_tokens=[])
    with pytest.raises(ValueError, match="merged_into: goes with mode compact"):
        plan_of(mode="stale")
