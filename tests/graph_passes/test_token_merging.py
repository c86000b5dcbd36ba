"""Plans that merge dropped tokens into kept ones: what the passes make of them in every layout and form, what they refuse."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import timm.layers
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.engines.build import build_engine
from graph_passes import OnnxModel, Settings, run_passes, save_model, slim
from graph_passes.analysis.macs import macs_of_graph
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.onnx_io.graph_convert import import_graph, with_shapes
from graph_passes.pass_registry import CutForm
from patchslim.choices import Layout
from patchslim.errors import InputRejected
from patchslim.macs import Geometry
from patchslim.plan import Origin, SlimPlan
from slimming.api import make_plan
from slimming.models.slim_vit import SlimViT
from tests.helpers.corpus import built, by_name, exporters
from tests.helpers.corpus.models import torch_model
from tests.helpers.onnx_models import dense, export_dense, ort_logits, tiny_vit
from tests.helpers.tensorrt_vit import AHEAD_OF_TIME, wide
from tests.helpers.tensorrt_vit import plan_of as tensorrt_plan
from tests.helpers.timm_models import build, images_for, random_masks

pytestmark = pytest.mark.numeric

LAYOUTS: list[Layout] = ["split", "packed"]
FORMS: list[CutForm] = ["auto", "slice", "gather", "matmul"]
FAMILIES: dict[str, dict[str, Any]] = {
    "parallel_scaling": {},
    "eva02_rope": {"global_pool": "token"},
    "gated": {},
    "res_post": {},
    "parallel_things": {},
    "grouped_query": {},
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# Plans


def merges_of(kept: Sequence[Sequence[int]], tokens: int, prefix: int, rng: random.Random, lost: float = 0.0) -> list[int]:
    """For every token that a block but the last drops a random patch that it keeps; a share is lost."""
    into, before = [-1] * tokens, set(range(tokens))
    for block in kept[:-1]:
        patches = [token for token in block if token >= prefix]
        for token in sorted(before - set(block)):
            if patches and rng.random() >= lost:
                into[token] = rng.choice(patches)
        before = set(block)
    return into


def merging_plan(model: Any, seed: int, lost: float = 0.0) -> SlimPlan:
    """A plan with random tokens that merges at least one."""
    rng, prefix = random.Random(seed), int(model.num_prefix_tokens)
    while True:
        kept = random_masks(model, rng)
        into = merges_of(kept, prefix + int(model.patch_embed.num_patches), prefix, rng, lost)
        if (
            max(into) >= 0 and len(kept[-2]) > prefix
        ):  # every block below the last keeps a patch, so that nothing has to be lost
            return make_plan(model, "tiny", kept, merged_into=into)


KEPT = [[0, *range(1, 16, 2)], [0, *range(1, 16, 2)], [0, 5, 11], [0]]


def plan_of(kept: Sequence[Sequence[int]] = KEPT, seed: int = 0, **changes: object) -> SlimPlan:
    """A plan for the plain model."""
    kept = [list(block) for block in kept]
    plan = make_plan(dense("plain")[0], "tiny", kept, merged_into=merges_of(kept, 17, 1, random.Random(seed)))
    return SlimPlan.model_validate(plan.model_dump() | changes)


def logits_under(model: nn.Module, plan: SlimPlan, images: Tensor) -> NDArray[np.float32]:
    with torch.no_grad():
        result: NDArray[np.float32] = SlimViT(model, plan)(images).numpy()
    return result


def total_macs(model: OnnxModel) -> int:
    return macs_of_graph(find_structure(import_graph(with_shapes(model)))).total


@cache
def exported(kind: str) -> tuple[Any, onnx.ModelProto]:
    if kind not in FAMILIES:
        return dense(kind)
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = build(kind, **FAMILIES[kind], img_size=32, patch_size=8)
    finally:
        timm.layers.set_fused_attn(bool(before))
    return model, export_dense(model)


# Against the PyTorch reference


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["plain", "distilled", "registers", "layer_scale", *FAMILIES])
def test_merging_in_the_export_equals_the_merging_module(kind: str, layout: Layout) -> None:
    model, graph = exported(kind)
    seed = LAYOUTS.index(layout)
    plan, form, images = merging_plan(model, seed), FORMS[(len(kind) + 2 * seed) % 4], images_for(model, 1 + seed, seed)
    result = slim(graph, plan, layout=layout, cut=form)
    expected = logits_under(model, plan, images)
    np.testing.assert_allclose(ort_logits(result.model, images), expected, atol=1e-4)
    assert np.abs(logits_under(model, plan.model_copy(update={"merged_into": None}), images) - expected).max() > 1e-2
    assert total_macs(result.model) == plan.macs(layout)
    onnx.checker.check_model(result.model.to_proto(), full_check=True)
    again = slim(result.model, plan, layout=layout, cut=form)
    assert not again.modified
    assert again.model.to_proto().SerializeToString() == result.model.to_proto().SerializeToString()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form_takes_kept_and_dropped_rows_and_costs_what_the_plan_says(layout: Layout, form: CutForm) -> None:
    model, graph = dense("plain")
    plan = plan_of()
    result = slim(graph, plan, layout=layout, cut=form)
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), logits_under(model, plan, IMAGES), atol=1e-4)
    assert total_macs(result.model) == plan.macs(layout)
    takers = {node.op_type for node in result.model.graph.node if node.name.endswith((".shortcut.dropped", "queries.dropped"))}
    assert takers == {{"auto": "Slice", "slice": "Slice", "gather": "Gather", "matmul": "MatMul"}[form]}
    biases = [node for node in result.model.graph.node if node.name.endswith(".sizes")]
    assert len(biases) == 3  # not the first block, where each token is its own


@pytest.mark.parametrize("seed", range(2))
def test_some_tokens_may_be_lost_while_others_are_merged(seed: int) -> None:
    model, graph = dense("distilled")
    plan = merging_plan(model, seed, lost=0.5)
    result = slim(graph, plan)
    assert total_macs(result.model) == plan.macs()
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), logits_under(model, plan, IMAGES), atol=1e-4)
    assert not slim(result.model, plan).modified


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp16_stays_close(layout: Layout) -> None:
    model, graph = exported("eva02_rope" if layout == "split" else "registers")
    plan, images = merging_plan(model, 1), images_for(model, 2)
    expected = logits_under(model, plan, images)
    result = slim(graph, plan, layout=layout, precision="fp16")
    assert np.abs(ort_logits(result.model, images) - expected).max() < 0.01 * np.abs(expected).max()
    assert not slim(result.model, plan, layout=layout, precision="fp16").modified


def test_a_plan_whose_tokens_are_all_lost_is_cut_as_if_it_merged_none() -> None:
    graph, plan = dense("plain")[1], plan_of(merged_into=None)
    lost = plan_of(merged_into=[-1] * 17)
    nothing = slim(graph, lost).model.to_proto()
    assert lost.macs() == plan.macs()
    assert nothing.SerializeToString() == slim(graph, plan).model.to_proto().SerializeToString()


def test_norms_that_the_exporter_wrote_out_are_seen_through() -> None:
    model, _ = dense("plain")
    graph = exporters.torchscript(model, IMAGES, 16, True)
    assert "LayerNormalization" not in {node.op_type for node in graph.graph.node}
    plan = plan_of()
    for layout in LAYOUTS:
        result = slim(graph, plan, layout=layout)
        np.testing.assert_allclose(ort_logits(result.model, IMAGES), logits_under(model, plan, IMAGES), atol=1e-4)


# Against dense models of other libraries, in which every token stays and merging is written over attention


@contextmanager
def merged_within(
    plan: SlimPlan,
    blocks: Sequence[nn.Module],
    sums: Sequence[nn.Module],
    norms: Sequence[nn.Module] = (),
    lost: Sequence[int] = (),
) -> Iterator[None]:
    """Let a dense model compute what the plan says, at the rows of kept tokens.

    ``sums`` are the modules whose output each block adds to its input, ``norms`` those that make of its input what only kept
    tokens need; the first block does not see those ``lost``. Queries go through the mean as they meet the keys: so no qk-norm.
    """
    sizes, before = [1] * plan.tokens, set(range(plan.tokens))
    means, biases = [], []
    for kept in plan.kept:
        hidden = [token not in before or (len(means) == 0 and token in lost) for token in range(plan.tokens)]
        biases.append(torch.tensor(sizes).log().masked_fill(torch.tensor(hidden), float("-inf")))
        mean = torch.eye(plan.tokens) * torch.tensor(sizes)
        for token in before - set(kept):
            if plan.merged_into is not None and (into := plan.merged_into[token]) >= 0:
                mean[into, token] = sizes[token]
                sizes[into] += sizes[token]
        means.append(mean / mean.sum(1, keepdim=True))
        before = set(kept)
    inputs: dict[int, Tensor] = {}
    attentions = iter(range(plan.depth))
    attend = nn.functional.scaled_dot_product_attention

    def merging(query: Tensor, key: Tensor, value: Tensor, *_: Any, **rest: Any) -> Tensor:
        block = next(attentions)
        return attend(means[block] @ query, key, value, attn_mask=biases[block][None], scale=rest.get("scale"))

    def note(block: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: inputs.update({block: given[0]})

    def summed(block: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _given: Any, out: Any) -> Any:
            moved = means[block] @ inputs[block] - inputs[block]
            return (out[0] + moved, *out[1:]) if isinstance(out, tuple) else out + moved

        return hook

    def normed(block: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _module, _given, out: means[block] @ out

    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        handles = [module.register_forward_pre_hook(note(block)) for block, module in enumerate(blocks)]
        handles += [module.register_forward_hook(summed(block)) for block, module in enumerate(sums)]
        handles += [module.register_forward_hook(normed(block)) for block, module in enumerate(norms)]
        for handle in handles:
            stack.callback(handle.remove)
        stack.enter_context(mock.patch.object(nn.functional, "scaled_dot_product_attention", merging))
        stack.enter_context(torch.no_grad())
        yield
    assert next(attentions, None) is None


def _blocks(family: str, model: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """A corpus model's blocks, and what each adds to its input."""
    if family == "hf_vit":
        return list(model.model.vit.layers), [layer.attention for layer in model.model.vit.layers]
    if family == "torchvision":
        return list(model.encoder.layers), [layer.dropout for layer in model.encoder.layers]
    return list(model.blocks), [block.ls1 for block in model.blocks]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("timm_class-dynamo23", "packed"),
        ("timm_class-rewritten:gemm", "split"),
        ("timm_class-rewritten:gather-qkv", "packed"),
        ("hf_vit-dynamo20", "split"),
        ("hf_vit-script17-unfused-unfolded", "packed"),
        ("torchvision-dynamo20", "packed"),
        ("torchvision-script17", "split"),
        ("torchvision-dynamo23", "split"),
    ],
)
def test_foreign_exports_are_merged_as_their_models(name: str, layout: Layout) -> None:
    subject = built(by_name(name))
    family = subject.case.family
    kept = [[0, 1, 3, 4, 7, 8, 12, 15, 16], [0, 3, 7, 8, 15], [0]]
    plan = SlimPlan(
        model=family,
        tokens=subject.tokens,
        grid=subject.grid,
        prefix_tokens=subject.prefix,
        pooling="token",
        head_tokens=subject.head_tokens,
        mode="compact",
        kept=kept,
        merged_into=merges_of(kept, subject.tokens, subject.prefix, random.Random(1)),
        geometry=Geometry(embed_dim=subject.width, mlp_hidden_dim=2 * subject.width, patch_macs=0, head_macs=0),
        origin=Origin(score="none", criterion="manual", value=0.0),
    )
    images, model = subject.images(1, 2), torch_model(family, True)
    with merged_within(plan, *_blocks(family, model)):
        expected = model(torch.from_numpy(images)).numpy()
    result = slim(subject.model, plan, layout=layout)
    session = ort.InferenceSession(result.model.to_proto().SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {subject.input_name: images})[0], expected, atol=1e-4)
    assert not slim(result.model, plan, layout=layout).modified


class TwoNorms(nn.Module):
    """A block whose attention and MLP stand side by side, each behind a norm of its own."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp, self.sum = block.norm1, block.norm2, block.attn, block.mlp, nn.Identity()

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        return tokens + self.sum(self.attn(self.norm1(tokens)) + self.mlp(self.norm2(tokens)))


def test_a_norm_that_kept_tokens_alone_need_is_merged_behind_it() -> None:
    model = tiny_vit()
    model.blocks = nn.Sequential(*(TwoNorms(block) for block in model.blocks))
    graph, plan = export_dense(model), plan_of()
    for block in model.blocks:
        block.attn.fused_attn = True
    blocks = list(model.blocks)
    with merged_within(plan, blocks, [block.sum for block in blocks], [block.norm2 for block in blocks]):
        expected = model(IMAGES).numpy()
    for layout in LAYOUTS:
        np.testing.assert_allclose(ort_logits(slim(graph, plan, layout=layout).model, IMAGES), expected, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_patches_that_the_first_block_merges_are_embedded(share: float) -> None:
    model, graph = tiny_vit(), dense("plain")[1]
    into = merges_of(KEPT, 17, 1, random.Random(5), share)
    plan = plan_of(merged_into=into)
    lost = [token for token in range(17) if token not in KEPT[0] and into[token] < 0]
    result = slim(graph, plan, also=["drop_patches"])
    assert next(entry for entry in result.results if entry.name == "drop_patches").sites == bool(lost) == bool(share)
    for block in model.blocks:
        block.attn.fused_attn = True
    with merged_within(plan, list(model.blocks), [block.ls1 for block in model.blocks], lost=lost):
        expected = model(IMAGES).numpy()
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), expected, atol=1e-4)
    assert not slim(result.model, plan, also=["drop_patches"]).modified


# What is refused


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
    graph, kept = export_dense(model), [KEPT[0], [0]]
    settings = Settings(make_plan(tiny_vit(depth=2), "tiny", kept, merged_into=merges_of(kept, 17, 1, random.Random(0))))
    result = run_passes(graph, ["cut_tokens"], settings)
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


def test_a_graph_that_was_cut_otherwise_is_refused() -> None:
    graph = dense("plain")[1]
    merged, lost = slim(graph, plan_of()).model, slim(graph, plan_of(merged_into=None)).model
    for model, plan, message in [
        (lost, plan_of(), "block 0: already cut without merging; the plan merges the dropped tokens"),
        (merged, plan_of(merged_into=None), "merged already, and the plan drops them without merging"),
        (merged, plan_of(seed=1), "merged already, but not as the plan says"),
        (merged, plan_of([KEPT[0], [0, 5], [0, 5], [0]]), "already cut to other tokens"),
    ]:
        with pytest.raises(InputRejected, match=message):
            slim(model, plan)


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
    graph.cleanup().toposort()
    model = gs.export_onnx(graph)
    del model.graph.value_info[:]
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


# In TensorRT


@AHEAD_OF_TIME[0]
@AHEAD_OF_TIME[1]
def test_every_attention_over_merged_tokens_is_fused(tmp_path: Any) -> None:
    plan = tensorrt_plan("compact")
    into = merges_of(plan.kept, plan.tokens, 1, random.Random(0))
    merged = SlimPlan.model_validate(plan.model_dump() | {"merged_into": into})
    path = tmp_path / "packed.onnx"
    save_model(slim(wide()[1], merged, layout="packed", precision="fp16").model, path)
    result = build_engine("trt", path, tmp_path / "packed", targets=["sm89"])
    assert (result.fused_attentions, result.attentions, result.precision) == (4, 4, "fp16")
