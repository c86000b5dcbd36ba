"""ONNX Runtime as the engine: same answers as PyTorch, and clear refusals."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.engines.build import build_engine
from export.engines.onnx_info import read_onnx
from export.engines.onnx_runtime import open_runner
from patchslim.errors import InputRejected, UsageError


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 8, stride=8), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(128, 10)]
    return torch.nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def onnx_path(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ort") / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        model, (torch.randn(2, 3, 32, 32),), path, dynamo=True, opset_version=20, dynamic_shapes=shapes, external_data=False
    )
    return path


def test_runner_answers_like_torch(model: torch.nn.Module, onnx_path: Path) -> None:
    images = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        expected = model(images).numpy()
    runner = open_runner(onnx_path, threads=1)
    assert runner.provider in ("CPUExecutionProvider", "CUDAExecutionProvider")
    assert (runner.name, runner.batch_limits, runner.image_shape) == (str(onnx_path), (1, None), (3, 32, 32))
    logits = runner.infer(images.numpy())
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_build_runs_the_file_once(onnx_path: Path, tmp_path: Path) -> None:
    result = build_engine("ort", onnx_path, tmp_path, precision="fp32", batch=(1, 4, 8))
    assert (result.backend, result.status, result.files) == ("onnxruntime", "executed", [onnx_path])
    assert result.fused_attentions is None
    assert result.targets in (["cpu"], ["cuda"])
    assert "executed" in result.summary()


def test_facts_are_read_from_the_file(onnx_path: Path) -> None:
    facts = read_onnx(onnx_path)
    assert (facts.image_shape, facts.fixed_batch, facts.attentions, facts.precision) == ((3, 32, 32), None, [], "fp32")


def test_wrong_image_shape_is_rejected(onnx_path: Path) -> None:
    with pytest.raises(InputRejected, match=r"model\.onnx.*\(1, 3, 16, 16\)"):
        open_runner(onnx_path).infer(np.zeros((1, 3, 16, 16)))


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_damaged_file_is_rejected_by_name(damage: str, onnx_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.onnx"
    content = {"empty": b"", "cut": onnx_path.read_bytes()[:900], "noise": bytes(range(256)) * 8}
    if damage in content:
        path.write_bytes(content[damage])
    with pytest.raises(InputRejected, match=r"damaged\.onnx"):
        open_runner(path)
    with pytest.raises(InputRejected, match=r"damaged\.onnx"):
        build_engine("ort", path, tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()


def test_two_inputs_are_rejected(onnx_path: Path, tmp_path: Path) -> None:
    model = onnx.load(str(onnx_path))
    model.graph.input.append(onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, [1]))
    onnx.save(model, str(tmp_path / "two.onnx"))
    with pytest.raises(InputRejected, match=r"two\.onnx: expected one input"):
        build_engine("ort", tmp_path / "two.onnx", tmp_path, precision="fp32")


def test_impossible_batch_is_a_usage_error(onnx_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="smallest <= usual <= largest"):
        build_engine("ort", onnx_path, tmp_path, precision="fp32", batch=(8, 4, 16))


def test_precision_must_be_what_the_file_says(onnx_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match="fp16 was asked for, but most of its weights are fp32"):
        build_engine("ort", onnx_path, tmp_path, precision="fp16")
