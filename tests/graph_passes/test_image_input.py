"""Images as bytes, or as floats from 0 to 255: what the graph answers, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from graph_passes import OnnxModel, Settings, run_passes
from graph_passes.pass_registry import ImageForm
from patchslim.errors import UsageError
from patchslim.plan import SlimPlan
from tests.helpers.onnx_models import (
    as_proto,
    dense,
    ort_logits,
    reference,
)
from tests.helpers.patch_plans import masked, names, plan_of, stem

pytestmark = pytest.mark.numeric

PIXELS = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
