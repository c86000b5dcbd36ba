"""ONNX Runtime's one opener: answers, batches, types, and refusals that name the file."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from patchslim.errors import InputRejected, Unavailable
from patchslim.ort_runner import CPU, OrtModel, OrtRunner
from patchslim.runner import Runner, TensorInfo, infer_in_batches
from tests.helpers.bundles import CLASSES, SIZE, weight, write_onnx

ROOT = Path(__file__).parents[2]


def images(count: int) -> Any:
    return np.random.default_rng(3).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)


def expected(given: Any) -> Any:
    return given.reshape(len(given), -1) @ weight()


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Path:
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_onnx(tmp_path / "model.onnx", weight())
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("batch", ["batch", 4])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9])
def test_any_number_of_images_is_answered_in_order(path: Path, batch: Any, count: int) -> None:
    write_onnx(path, weight(), batch=batch)
    runner: Runner = OrtRunner(path, threads=1)
    assert runner.batch_limits == ((1, None) if batch == "batch" else (4, 4))
    logits = infer_in_batches(runner, images(count), 3)
    assert (logits.shape, logits.dtype) == ((count, CLASSES), np.float32)
    np.testing.assert_allclose(logits, expected(images(count)), atol=1e-5)


def test_half_precision_takes_and_gives_float32(path: Path) -> None:
    write_onnx(path, weight().astype(np.float16))
    runner = OrtRunner(path)
    assert runner.dtype == np.float16
    logits = runner.infer(images(2))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected(images(2)), atol=0.05)


def test_a_runner_says_what_it_is(path: Path) -> None:
    with OrtRunner(path) as runner:
        assert (runner.name, runner.provider, runner.image_shape) == (str(path), CPU, (3, SIZE, SIZE))
        assert runner.inputs == [TensorInfo("image", "tensor(float)", ("batch", 3, SIZE, SIZE))]
        assert [str(output) for output in runner.outputs] == [f"logits tensor(float) [batch, {CLASSES}]"]
        session = weakref.ref(runner._session)
    gc.collect()
    assert session() is None


def test_a_serialised_model_runs_under_the_name_given(path: Path) -> None:
    runner = OrtRunner(path.read_bytes(), name="block 3")
    np.testing.assert_allclose(runner.infer(images(2)), expected(images(2)), atol=1e-5)
    with pytest.raises(InputRejected, match=r"^block 3: ONNX Runtime cannot run it on image \(2, 3, 4, 4\)"):
        runner.infer(images(2)[:, :, :4, :4])
    with pytest.raises(InputRejected, match=r"^block 4: ONNX Runtime cannot load it"):
        OrtRunner(b"no model", name="block 4")


def test_a_fixed_batch_is_refused_by_infer_itself(path: Path) -> None:
    write_onnx(path, weight(), batch=4)
    with pytest.raises(InputRejected, match=r"model\.onnx: .*\(3, 3, 8, 8\)"):
        OrtRunner(path).infer(images(3))


@pytest.mark.parametrize(
    "inputs",
    [
        [value("image", ["batch", 3, 8, 8]), value("mask", [1])],
        [value("image", ["batch", 3, "height", "width"])],
        [value("image", ["batch", 192])],
        [value("image", ["batch", 3, 8, 8], TensorProto.UINT8)],
    ],
    ids=["two inputs", "free size", "no image", "bytes"],
)
def test_a_model_that_is_no_image_classifier_is_refused(tmp_path: Path, inputs: list[Any]) -> None:
    nodes = [helper.make_node("Identity", ["image"], ["out"])]
    path = save(
        tmp_path / "other.onnx", nodes, inputs, [value("out", ["batch", *([None] * 3)], inputs[0].type.tensor_type.elem_type)]
    )
    with pytest.raises(InputRejected, match=r"other\.onnx: expected one floating-point input .*; found image tensor\("):
        OrtRunner(path)
    assert OrtModel(path).inputs[0].name == "image"  # as a model it runs


def test_answers_that_are_no_logits_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["image"], ["out"])]
    path = save(tmp_path / "identity.onnx", nodes, [value("image", ["batch", 3, 8, 8])], [value("out", ["batch", 3, 8, 8])])
    with pytest.raises(InputRejected, match=r"identity\.onnx: answers with shape \(2, 3, 8, 8\) for 2 images"):
        OrtRunner(path).infer(images(2))


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: bytes(range(256)) * 8],
    ids=["empty", "truncated", "noise"],
)
def test_a_damaged_file_is_refused_by_name(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputRejected, match=r"model\.onnx"):
        OrtRunner(path)


def test_what_is_not_here(path: Path) -> None:
    with pytest.raises(InputRejected, match=r"missing\.onnx: is not a file"):
        OrtRunner(path.with_name("missing.onnx"))
    with pytest.raises(Unavailable, match=r"no NoSuchProvider here; it has .*CPUExecutionProvider"):
        OrtRunner(path, provider="NoSuchProvider")
    nodes = [helper.make_node("MatMul", ["image", "image"], ["out"])]
    kind = TensorProto.BFLOAT16
    save(path, nodes, [value("image", [1, 3, 8, 8], kind)], [value("out", [1, 3, 8, 8], kind)])
    with pytest.raises(Unavailable, match=r"model\.onnx: ONNX Runtime has no kernel for it"):
        OrtModel(path)


def test_a_bound_run_does_the_work(path: Path) -> None:
    """The values are cast as the model wants them, and every run reads them from the start: no copy, no state."""
    model = OrtModel(path)
    run = model.bound(images(4).astype(np.float64))
    for _ in range(3):
        run()
    with pytest.raises(Exception, match=r"(?i)invalid|dimension"):
        model.bound(images(4)[:, :, :4])()


def test_a_closed_model_says_so(path: Path) -> None:
    with OrtRunner(path) as runner:
        assert runner.infer(images(2)).shape == (2, CLASSES)
    with pytest.raises(InputRejected, match="it is closed"):
        runner.infer(images(2))
    runner.close()


def test_the_ground_needs_no_onnxruntime_until_a_model_is_opened(path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['onnxruntime'] = None\n"
        "from pathlib import Path\n"
        "from patchslim.errors import Unavailable\n"
        "from patchslim.ort_runner import OrtRunner\n"
        "try:\n"
        f"    OrtRunner(Path({str(path)!r}))\n"
        "except Unavailable as error:\n"
        "    sys.exit('.[edge]' not in str(error))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
