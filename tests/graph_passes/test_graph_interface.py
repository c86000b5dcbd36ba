"""What a graph takes and gives: a size for symbolic axes, and fewer outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch

from graph_passes import OnnxModel, slim
from graph_passes.onnx_io.graph_interface import with_image_size, with_outputs
from patchslim.errors import InputRejected, UsageError
from tests.helpers.onnx_models import (
    dense,
    ort_logits,
    reference,
    tiny_vit,
    trace,
)
from tests.helpers.patch_plans import plan_of

pytestmark = pytest.mark.numeric

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


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
