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
import onnxruntime as ort
import pytest
import timm.layers
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.engines.build import build_engine
from graph_passes import OnnxModel, save_model, slim, to_fp16
from graph_passes.analysis.macs import macs_of_graph
from graph_passes.analysis.vit_structure import find_structure
from graph_passes.cutting.row_ops import MOST_TERMS
from graph_passes.onnx_io.graph_convert import import_graph, with_shapes
from graph_passes.pass_registry import CutForm
from patchslim.choices import Layout
from patchslim.errors import InputRejected
from patchslim.macs import Geometry
from patchslim.plan import Origin, SlimPlan
from slimming.api import make_plan
from slimming.models.slim_vit import SlimViT
from tests.helpers import exporters
from tests.helpers.corpus import built, by_name
from tests.helpers.corpus.models import torch_model
from tests.helpers.merging import KEPT, merges_of, plan_of
from tests.helpers.onnx_models import dense, export_dense, ort_logits, tiny_vit, trace
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


def logits_under(model: nn.Module, plan: SlimPlan, images: Tensor) -> NDArray[np.float32]:
    with torch.no_grad():
        result: NDArray[np.float32] = SlimViT(model, plan)(images).numpy()
    return result


def total_macs(model: OnnxModel) -> int:
    return macs_of_graph(find_structure(import_graph(with_shapes(model)))).total


@cache
def exported(kind: str) -> tuple[Any, onnx.ModelProto]:
    """A tiny model and its export; of a family of its own by TorchScript, and by dynamo where its name ends so."""
    family, _, exporter = kind.partition("-")
    if family not in FAMILIES:
        return dense(family)
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = build(family, **FAMILIES[family], img_size=32, patch_size=8)
    finally:
        timm.layers.set_fused_attn(bool(before))
    return model, export_dense(model) if exporter == "dynamo" else trace(model)


# Against the PyTorch reference


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "kind",
    [
        *["plain", "distilled", "registers", "layer_scale", "parallel_scaling", "eva02_rope"],
        *(pytest.param(f"{kind}-dynamo", marks=pytest.mark.slow) for kind in FAMILIES),
    ],
)
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
    takers = {node.op_type for node in result.model.graph.node if node.name.endswith((".shortcut.dropped", ".kept.dropped"))}
    forms = {"auto": "Slice", "slice": "Slice", "gather": "Gather", "matmul": "MatMul"}
    assert takers == ({forms[form]} if layout == "split" else set())
    products = [node.op_type for node in result.model.graph.node if node.name.endswith(".merged")]
    assert {*products} == {"MatMul" if layout == "split" else "ReduceSum"}
    biases = [node for node in result.model.graph.node if node.name.endswith(".sizes")]
    assert len(biases) == 3  # not the first block, where each token is its own


def test_sums_of_many_rows_are_sums_of_sums() -> None:
    model, graph = dense("plain")
    plan = plan_of([[0, 5], [0, 5], [0, 5], [0]])  # 15 tokens go into one
    result = slim(graph, plan, layout="packed")
    tables = {node.name: node.input[1] for node in result.model.graph.node if node.name.endswith(".terms")}
    assert {"block_0.queries.part_0.terms", "block_0.queries.terms"} <= {*tables}
    shapes = {tensor.name: list(tensor.dims) for tensor in result.model.graph.initializer}
    assert max(shapes[table][1] for table in tables.values()) == MOST_TERMS
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), logits_under(model, plan, IMAGES), atol=1e-4)
    assert total_macs(result.model) == plan.macs("packed")
    assert not slim(result.model, plan, layout="packed").modified
    with pytest.raises(InputRejected, match="merged already, but not as the plan says"):
        slim(result.model, plan_of([[0, 5], [0, 5], [0, 5], [0]], merged_into=[*plan.merged_into[:-1], -1]), layout="packed")


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
        pytest.param("hf_vit-script17-unfused-unfolded", "packed", marks=pytest.mark.slow),
        pytest.param("torchvision-dynamo20", "packed", marks=pytest.mark.slow),
        ("torchvision-script17", "split"),
        pytest.param("torchvision-dynamo23", "split", marks=pytest.mark.slow),
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
    graph, plan = trace(model), plan_of()
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


# In TensorRT


@AHEAD_OF_TIME[0]
@AHEAD_OF_TIME[1]
def test_every_attention_over_merged_tokens_is_fused_and_merging_costs_no_kernels(tmp_path: Any) -> None:
    plan = tensorrt_plan("compact")
    into = merges_of(plan.kept, plan.tokens, 1, random.Random(0))
    merged = SlimPlan.model_validate(plan.model_dump() | {"merged_into": into})
    kernels: dict[str, int] = {}
    for name, model in {
        "dense": to_fp16(wide()[1]),
        "dropped": slim(wide()[1], plan, layout="packed", precision="fp16").model,
        "merged": slim(wide()[1], merged, layout="packed", precision="fp16").model,
    }.items():
        path = tmp_path / f"{name}.onnx"
        save_model(model, path)
        result = build_engine("trt", path, tmp_path / name, targets=["sm89"])
        assert (result.fused_attentions, result.attentions, result.precision) == (4, 4, "fp16")
        kernels[name] = result.kernels["sm89"]
    assert kernels["merged"] == kernels["dropped"] < kernels["dense"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_openvino_answers_a_merged_plan_in_the_precision_that_it_chooses(layout: Layout) -> None:
    """On a CPU with bfloat16 it chooses that, and took a mask without the heads' axis for another one: 11.5 % top-1."""
    openvino = pytest.importorskip("openvino")
    model, graph = exported("plain")
    plan = merging_plan(model, 3)
    result = slim(graph, plan, layout=layout)
    wanted = logits_under(model, plan, IMAGES)
    proto = result.model.to_proto().SerializeToString()
    for hint in ("f32", "bf16", None):
        config = {} if hint is None else {"INFERENCE_PRECISION_HINT": hint}
        core = openvino.Core()
        answers = core.compile_model(core.read_model(proto), "CPU", config)([IMAGES.numpy()])[0]
        error = np.abs(answers - wanted).max() / np.abs(wanted).max()
        assert error < (1e-4 if hint == "f32" else 0.03), hint
