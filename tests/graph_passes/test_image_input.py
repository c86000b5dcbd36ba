"""What a graph takes: patches that are never embedded, images as bytes, a size for symbolic axes, fewer outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from graph_passes import OnnxModel, Settings, run_passes, slim
from graph_passes.cutting.plan_layout import embedded_tokens
from graph_passes.onnx_io.graph_interface import with_image_size, with_outputs
from graph_passes.pass_manager import default_passes
from graph_passes.pass_registry import CutForm, ImageForm
from patchslim.choices import Layout, Mode
from patchslim.errors import InputRejected, UsageError
from patchslim.plan import SlimPlan
from tests.helpers.onnx_models import (
    SIZES,
    as_proto,
    dense,
    edited_model,
    ort_logits,
    plan_for,
    reference,
    tiny_vit,
    trace,
    traced,
)

pytestmark = pytest.mark.numeric

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
PIXELS = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCHES = [[1, 4, 5, 8, 10, 13, 15], [1, 4, 5, 8, 10, 13, 15], [4, 10, 15], []]  # that each block keeps, of 16


def exported_model(kind: str) -> tuple[VisionTransformer, onnx.ModelProto]:
    return dense(kind) if kind in SIZES else traced(kind)


def plan_of(kind: str, mode: Mode = "compact", patches: Sequence[Sequence[int]] = PATCHES) -> SlimPlan:
    model = exported_model(kind)[0]
    prefix = model.num_prefix_tokens
    heads = 2 if kind == "distilled" else 1
    return plan_for(model, [[*range(prefix if kept else heads), *(prefix + patch for patch in kept)] for kept in patches], mode)


def names(*also: str, layout: Layout = "split", before: str = "order_tokens") -> list[str]:
    """The default passes with others put before one of them."""
    result = default_passes(layout, "fp32")
    place = result.index(before)
    return [*result[:place], *also, *result[place:]]


@torch.no_grad()
def masked(model: VisionTransformer, plan: SlimPlan, images: torch.Tensor) -> NDArray[np.float32]:
    """The plan by masks alone: every token goes through every block, but keys are hidden, of never embedded patches always."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    readable = embedded_tokens(plan)
    for block, kept in zip(model.blocks, plan.kept, strict=True):
        attention, (batch, count, width) = block.attn, x.shape
        split = (batch, count, 3, attention.num_heads, width // attention.num_heads)
        q, k, v = attention.qkv(block.norm1(x)).reshape(split).permute(2, 0, 3, 1, 4)
        hidden = torch.full((count,), -torch.inf)
        hidden[readable] = 0
        weights = (attention.q_norm(q) @ attention.k_norm(k).transpose(-2, -1) * attention.scale + hidden).softmax(-1)
        y = x + block.ls1(attention.proj(attention.norm((weights @ v).transpose(1, 2).reshape(x.shape))))
        y = y + block.ls2(block.mlp(block.norm2(y)))
        x = x.clone()
        x[:, kept] = y[:, kept]
        readable = kept if plan.mode == "compact" else readable
    x = model.norm(x)
    if isinstance(model, VisionTransformerDistilled):
        return ((model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2).numpy()
    return model.head(model.fc_norm(x[:, 0])).numpy()


@pytest.mark.parametrize(
    ("kind", "mode", "layout"),
    [
        pytest.param(kind, mode, layout, marks=[pytest.mark.slow] * ((number + (mode == "stale") + (layout == "packed")) % 2))
        for number, kind in enumerate(["plain", "registers", "distilled", "layer_scale", "no_positions"])
        for mode in ("compact", "stale")
        for layout in ("split", "packed")
    ],
)
def test_dropped_patches_are_masked_everywhere(kind: str, mode: Mode, layout: Layout) -> None:
    model, exported = exported_model(kind)
    plan = plan_of(kind, mode)
    settings, passes = Settings(plan, layout), names("drop_patches", layout=layout)
    result = run_passes(exported, passes, settings)
    sites = {entry.name: entry.sites for entry in result.results}
    assert [entry.refused for entry in result.results if entry.refused] == []
    assert (sites["drop_patches"], sites["order_tokens"]) == (1, 0)
    assert sites["cut_tokens"] == 2  # the first two blocks compute all that they now read
    expected = masked(model, plan, IMAGES)
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), expected, atol=1e-4)
    assert np.abs(expected - reference(model, plan, IMAGES)).max() > 1e-3  # else masks would not have mattered
    for again in (run_passes(result.model, passes, settings), slim(result.model, plan, layout=layout)):
        assert not again.modified
        assert [entry.refused for entry in again.results if entry.refused] == []


@pytest.mark.parametrize("cut", ["auto", "slice", "gather", "matmul"])
def test_patches_are_taken_once_in_the_form_asked_for(cut: CutForm) -> None:
    model, exported = dense("plain")
    plan = plan_of("plain")
    result = run_passes(exported, names("drop_patches"), Settings(plan, cut=cut))
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), masked(model, plan, IMAGES), atol=1e-4)
    nodes = result.model.graph.node
    taking = [node.op_type for node in nodes if node.name.startswith("token_order")]
    runs = {"auto": ["Gather"], "gather": ["Gather"], "matmul": ["MatMul"]}
    assert taking == runs.get(cut, ["Slice"] * 7 + ["Concat"])
    assert "Conv" not in {node.op_type for node in nodes}
    shapes = {tensor.name: list(tensor.dims) for tensor in result.model.graph.initializer}
    shapes |= {weight.name: list(weight.shape) for weight in result.model.weights.values()}
    assert [1, 8, 48] in shapes.values()  # positions of the kept tokens only
    assert [1, 17, 48] not in shapes.values()


def test_the_passes_before_need_not_have_run_and_dropping_alone_is_right() -> None:
    model, exported = dense("plain")
    only_first = plan_of("plain", patches=[PATCHES[0]] * 4)
    result = run_passes(exported, ["fold_constants", "drop_patches"], Settings(only_first))
    np.testing.assert_allclose(ort_logits(result.model, IMAGES), masked(model, only_first, IMAGES), atol=1e-4)
    assert not slim(result.model, only_first, passes=["order_tokens", "split_qkv", "cut_tokens"]).modified


def test_a_plan_whose_first_block_keeps_all_drops_no_patch() -> None:
    _, exported = dense("plain")
    plan = plan_of("plain", patches=[range(16), *PATCHES[1:]])
    assert not run_passes(exported, ["drop_patches"], Settings(plan)).modified


def test_other_patches_cannot_be_dropped_from_a_graph_that_lost_some() -> None:
    _, exported = dense("plain")
    dropped = run_passes(exported, ["fold_constants", "drop_patches"], Settings(plan_of("plain"))).model
    for plan in (plan_of("plain", patches=[range(16)] * 4), plan_of("plain", patches=[PATCHES[0][1:], *PATCHES[2:], []])):
        for name in ("drop_patches", "order_tokens", "cut_tokens"):
            with pytest.raises(InputRejected, match="patches of another plan were dropped"):
                slim(dropped, plan, passes=[name])


@pytest.mark.parametrize("name", ["order_tokens", "cut_tokens"])
def test_dropping_behind_the_passes_that_it_goes_before_is_refused(name: str) -> None:
    with pytest.raises(InputRejected, match=f"drop_patches goes before {name}"):
        slim(dense("plain")[1], plan_of("plain"), passes=["fold_constants", name, "drop_patches"])


def stem(change: str) -> onnx.ModelProto:
    """The plain export with another stem, which gives as many tokens."""
    graph = gs.import_onnx(dense("plain")[1])
    (conv,) = [node for node in graph.nodes if node.op == "Conv"]
    if change == "two convolutions":
        weight = gs.Constant("first_weight", np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1))
        between = gs.Variable("between", np.float32)
        graph.nodes.insert(0, gs.Node("Conv", "first", {}, [conv.inputs[0], weight], [between]))
        conv.inputs[0] = between
    elif change == "padding":
        weight = np.asarray(conv.inputs[1].values)
        conv.inputs[1] = gs.Constant("wide", np.pad(weight, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge"))
        conv.attrs |= {"pads": [1, 1, 1, 1], "kernel_shape": [10, 10]}
    elif change == "a norm of the grid":
        reader, out = conv.outputs[0].outputs[0], gs.Variable("normed", np.float32)
        one = gs.Constant("one", np.ones((1, 48, 1, 1), np.float32))
        graph.nodes.append(gs.Node("Add", "bias", {}, [conv.outputs[0], one], [out]))
        reader.inputs[0] = out
    return edited_model(graph)


@pytest.mark.parametrize(
    ("change", "site", "reason"),
    [
        ("two convolutions", "Conv node 'first'", "expected one convolution"),
        ("padding", "Conv node", r"a stride of \[10, 10\], as its kernel, no padding"),
        ("a norm of the grid", "Conv node", "expected its output to be moved"),
    ],
)
def test_other_stems_are_refused_with_node_and_expectation(change: str, site: str, reason: str) -> None:
    model = stem(change)
    result = run_passes(model, ["drop_patches"], Settings(plan_of("plain")))
    with pytest.raises(InputRejected, match=reason):
        slim(model, plan_of("plain"), passes=["drop_patches"])
    assert result.results[0].refused[0].site.startswith(site)
    assert result.model.to_proto() == OnnxModel.from_proto(model).to_proto()


def of_bytes(image: ImageForm, plan: SlimPlan | None = None) -> Settings:
    return Settings(plan, image=image, mean=MEAN, std=STD)


def normalised() -> torch.Tensor:
    """The pixels as the float model takes them."""
    return ((PIXELS.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).float()


FORMS: tuple[ImageForm, ...] = ("uint8-nchw", "uint8-nhwc", "float-nchw-255")
#: Nodes that a form needs between the input and a stem of float32 planes.
NODES = {"uint8-nchw": ["Cast"], "uint8-nhwc": ["Cast", "Transpose"], "float-nchw-255": []}


def logits_of_pixels(model: OnnxModel, image: ImageForm) -> NDArray[np.float32]:
    pixels = PIXELS.permute(0, 2, 3, 1).contiguous() if image == "uint8-nhwc" else PIXELS
    pixels = pixels.float() if image == "float-nchw-255" else pixels
    (value,) = model.graph.input
    kind = onnx.TensorProto.FLOAT if image == "float-nchw-255" else onnx.TensorProto.UINT8
    assert value.type.tensor_type.elem_type == kind
    metadata = {entry.key: entry.value for entry in model.skeleton.metadata_props}
    assert metadata["Image.NominalPixelRange"] == "NominalRange_0_255"
    assert [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim][1:] == list(pixels.shape[1:])
    assert value.type.tensor_type.shape.dim[0].dim_param
    return ort_logits(model, pixels)


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        pytest.param(kind, image, marks=[pytest.mark.slow] * (place != number))
        for number, kind in enumerate(["plain", "registers", "distilled"])
        for place, image in enumerate(FORMS)
    ],
)
def test_pixels_give_what_normalised_floats_gave(kind: str, image: ImageForm) -> None:
    _, exported = dense(kind)
    plan = plan_of(kind)
    for passes in (["image_input"], names("image_input"), names("image_input", before="elide_identities")):
        result = run_passes(exported, passes, of_bytes(image, plan))
        assert [entry.refused for entry in result.results if entry.refused] == []
        wanted = run_passes(exported, [name for name in passes if name != "image_input"], Settings(plan)).model
        np.testing.assert_allclose(logits_of_pixels(result.model, image), ort_logits(wanted, normalised()), atol=1e-4)
        more = [node.op_type for node in result.model.graph.node if node.name.startswith("images.")]
        assert more == NODES[image]
        again = run_passes(result.model, passes, of_bytes(image, plan))
        assert not again.modified
        assert [entry.refused for entry in again.results if entry.refused] == []


@pytest.mark.parametrize("image", FORMS)
def test_pixels_with_dropped_patches(image: ImageForm) -> None:
    model, exported = dense("plain")
    plan = plan_of("plain")
    expected = masked(model, plan, normalised())
    for also, spare in ((["image_input", "drop_patches"], 0), (["drop_patches", "image_input"], 2)):
        result = run_passes(exported, names(*also), of_bytes(image, plan)).model
        np.testing.assert_allclose(logits_of_pixels(result, image), expected, atol=1e-4)
        assert sum(node.op_type in ("Sub", "Mul") for node in result.graph.node) == spare
        assert not run_passes(result, names(*also), of_bytes(image, plan)).modified


@pytest.mark.parametrize("order", [["image_input", "to_fp16"], ["to_fp16", "image_input"]])
@pytest.mark.parametrize("image", FORMS)
def test_pixels_before_and_behind_fp16_are_one_cast(order: list[str], image: ImageForm) -> None:
    model, exported = dense("plain")
    plan = plan_of("plain")
    result = run_passes(exported, [*names(), *order], of_bytes(image, plan)).model
    casts = [node for node in result.graph.node if node.op_type == "Cast" and node.input[0] == "images"]
    assert [attribute.i for node in casts for attribute in node.attribute] == [onnx.TensorProto.FLOAT16]
    expected = reference(model, plan, normalised())
    assert np.abs(logits_of_pixels(result, image) - expected).max() < 0.01 * np.abs(expected).max()
    assert not run_passes(result, order, of_bytes(image, plan)).modified


@pytest.mark.parametrize("image", FORMS)
def test_padding_and_other_stems_are_normalised_by_two_nodes(image: ImageForm) -> None:
    for change, spare in (("padding", 2), ("two convolutions", 0)):
        model = stem(change)
        result = run_passes(model, ["image_input"], of_bytes(image)).model
        expected = ort_logits(model, normalised())
        np.testing.assert_allclose(logits_of_pixels(result, image), expected, atol=1e-4)
        assert not run_passes(result, ["image_input"], of_bytes(image)).modified
        assert sum(node.op_type in ("Sub", "Mul") and node.name.startswith("images.") for node in result.graph.node) == spare


def test_weights_that_something_else_reads_too_stay_as_they_are() -> None:
    graph = gs.import_onnx(dense("plain")[1])
    (conv,) = [node for node in graph.nodes if node.op == "Conv"]
    graph.outputs.append(gs.Variable("weight_again", np.float32, conv.inputs[1].shape))
    graph.nodes.append(gs.Node("Identity", "copy", {}, [conv.inputs[1]], [graph.outputs[1]]))
    model = OnnxModel.from_proto(gs.export_onnx(graph))
    result = run_passes(model, ["image_input"], of_bytes("uint8-nchw")).model
    session = ort.InferenceSession(as_proto(result).SerializeToString(), providers=["CPUExecutionProvider"])
    logits, weight = session.run(None, {"images": PIXELS.numpy()})
    np.testing.assert_array_equal(weight, conv.inputs[1].values)
    np.testing.assert_allclose(logits, ort_logits(dense("plain")[1], normalised()), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (Settings(), "--image uint8-nchw, uint8-nhwc, float-nchw-255"),
        (Settings(image="uint8-nchw", std=STD), "--mean must have one value for each of the 3 channels; none was given"),
        (Settings(image="uint8-nchw", mean=MEAN), "--std must have one value .* none was given"),
        (Settings(image="uint8-nhwc", mean=MEAN[:2], std=STD), "--mean must have .* 2 were given"),
        (Settings(image="uint8-nhwc", mean=MEAN, std=(0.2, 0.0, 0.2)), "--std must be positive"),
        (Settings(image="uint8-nhwc", mean=(0.5, float("nan"), 0.5), std=STD), "--mean must be finite"),
    ],
)
def test_settings_that_do_not_fit_are_usage_errors(settings: Settings, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        run_passes(dense("plain")[1], ["image_input"], settings)


@pytest.mark.parametrize("asked", FORMS)
@pytest.mark.parametrize("has", FORMS)
def test_pixels_of_another_form_are_refused(has: ImageForm, asked: ImageForm) -> None:
    taken = run_passes(dense("plain")[1], ["image_input"], of_bytes(has)).model
    (report,) = run_passes(taken, ["image_input"], of_bytes(asked)).results
    kind = "floats from 0 to 255" if has == "float-nchw-255" else "bytes"
    expected = [] if has == asked else [f"takes {kind} already, but not as {asked}"]
    assert [refusal.reason for refusal in report.refused] == expected
    assert not report.modified


def test_what_was_to_be_done_outside_is_no_longer_in_the_metadata() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(dense("plain")[1])
    onnx.helper.set_model_props(model, {"normalization": "outside", "labels": "kept"})
    result = run_passes(model, ["image_input"], of_bytes("float-nchw-255")).model
    found = {entry.key: entry.value for entry in result.skeleton.metadata_props}
    assert found == {"labels": "kept", "Image.NominalPixelRange": "NominalRange_0_255"}


def symbolic(shape: Sequence[int | str]) -> OnnxModel:
    """The plain export with its input's axes as another exporter names them."""
    model = onnx.ModelProto()
    model.CopyFrom(dense("plain")[1])
    value = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)
    model.graph.input[0].CopyFrom(value)
    del model.graph.value_info[:]
    return OnnxModel.from_proto(model)


@pytest.mark.parametrize("shape", [["b", "c", "h", "w"], ["b", 3, "h", "w"], ["b", 3, 32, "w"], ["b", 3, 32, 32]])
def test_a_size_makes_symbolic_images_fixed(shape: list[int | str]) -> None:
    model = symbolic(shape)
    before = model.skeleton.SerializeToString()
    sized = with_image_size(model, 32, 32)
    dims = sized.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["b", 3, 32, 32]
    assert sized.weights is model.weights
    assert model.skeleton.SerializeToString() == before
    plan = plan_of("plain")
    expected = reference(dense("plain")[0], plan, IMAGES)
    np.testing.assert_allclose(ort_logits(slim(sized, plan).model, IMAGES), expected, atol=1e-4)
    with pytest.raises(InputRejected, match="pass find_blocks refused"):
        slim(symbolic(["b", "c", "h", "w"]), plan, passes=["find_blocks"])


def test_a_size_is_read_where_channels_are_last() -> None:
    dims = with_image_size(symbolic(["b", "h", "w", 3]), 32, 48).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["b", 32, 48, 3]


@pytest.mark.parametrize(
    ("shape", "size", "fault"),
    [
        (["b", 3, 32, 32], (64, 32), r"\['b', 3, 32, 32\]; its images cannot be 64 x 32"),
        (["b", 3, "h", 32], (32, 64), "cannot be 32 x 64"),
        (["b", 3, "h", "w"], (0, 32), "at least 1"),
        (["b", "n"], (32, 32), "one graph input of four axes; found 'images' of 2 axes"),
    ],
)
def test_a_size_that_contradicts_the_graph_is_a_usage_error(shape: list[int | str], size: tuple[int, int], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        with_image_size(symbolic(shape), *size)


def with_features() -> OnnxModel:
    """The plain model that also gives the last block's tokens, as exports of hidden states do, through a layer of its own."""

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny_vit()
            self.extra = torch.nn.Linear(48, 64)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = self.vit.forward_features(images)
            return self.vit.forward_head(tokens), self.extra(tokens)

    return OnnxModel.from_proto(trace(Both().eval(), outputs=("logits", "features")))


def test_outputs_are_chosen_and_what_served_the_others_is_gone() -> None:
    both, plan = with_features(), plan_of("plain")
    with pytest.raises(InputRejected, match="choose other outputs"):
        slim(both, plan)
    one = with_outputs(both, ["logits"])
    assert [output.name for output in one.graph.output] == ["logits"]
    gone = [both.weights[name].shape for name in set(both.weights) - set(one.weights)]
    assert gone == [(48, 64)]
    assert all(one.weights[name].data is both.weights[name].data for name in one.weights)
    np.testing.assert_allclose(ort_logits(one, IMAGES), ort_logits(both, IMAGES), atol=1e-5)
    expected = reference(dense("plain")[0], plan, IMAGES)
    np.testing.assert_allclose(ort_logits(slim(one, plan).model, IMAGES), expected, atol=1e-4)
    turned = with_outputs(both, ["features", "logits"])
    assert [output.name for output in turned.graph.output] == ["features", "logits"]
    assert with_outputs(both, ["logits", "features"]) is both


@pytest.mark.parametrize("chosen", [["logit"], [], ["logits", "logits"]])
def test_outputs_that_are_not_there_are_a_usage_error(chosen: list[str]) -> None:
    with pytest.raises(UsageError, match="the graph has logits"):
        with_outputs(OnnxModel.from_proto(dense("plain")[1]), chosen)
