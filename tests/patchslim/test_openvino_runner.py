"""ONNX models in OpenVINO: the answers of ONNX Runtime, in float32 whatever the processor would rather do, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from patchslim.errors import InputRejected
from patchslim.openvino_compiler import MOST_COMPILED, GraphCompiler
from patchslim.openvino_runner import OpenVinoModel, OpenVinoRunner, save_ir
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.ort_runner import OrtRunner
from tests.helpers.bundles import CLASSES, SIZE, weight, write_onnx

pytest.importorskip("openvino")
ROOT = Path(__file__).parents[2]
ONE_THREAD = OpenVinoSettings(threads=1)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_answers_are_those_of_onnx_runtime(half: bool, as_bytes: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(path, weight().astype(np.float16) if half else weight())
    images = RNG.standard_normal((5, 3, SIZE, SIZE)).astype(np.float32)
    with OpenVinoRunner(path.read_bytes() if as_bytes else path, ONE_THREAD) as runner, OrtRunner(path) as reference:
        assert (runner.inputs, runner.outputs) == (reference.inputs, reference.outputs)
        assert (runner.batch_limits, runner.image_shape, runner.dtype) == ((1, None), (3, SIZE, SIZE), reference.dtype)
        first, second = runner.infer(images), runner.infer(-images)
        assert first.dtype == np.float32
        np.testing.assert_allclose(first, reference.infer(images), atol=1e-2 if half else 1e-5)
        np.testing.assert_allclose(second, -first, atol=1e-2 if half else 1e-5)  # the first is not overwritten


def test_a_fixed_batch_and_weights_beside_the_file(tmp_path: Path) -> None:
    write_onnx(tmp_path / "model.onnx", weight(), batch=4, external="weights.bin")
    with OpenVinoRunner(tmp_path / "model.onnx") as runner:
        assert runner.batch_limits == (4, 4)
        assert runner.infer(np.zeros((4, 3, SIZE, SIZE))).shape == (4, CLASSES)
        with pytest.raises(InputRejected, match=r"model\.onnx: OpenVINO cannot run it on \(3, 3, 8, 8\)"):
            runner.infer(np.zeros((3, 3, SIZE, SIZE)))


def test_it_is_compiled_for_a_few_numbers_of_images_and_then_for_any(tmp_path: Path) -> None:
    write_onnx(tmp_path / "model.onnx", weight())
    save_ir(tmp_path / "model.onnx", tmp_path / "model.xml")
    settings = OpenVinoSettings(threads=1, cache=tmp_path / "cache")
    images = RNG.standard_normal((9, 3, SIZE, SIZE)).astype(np.float32)
    with OrtRunner(tmp_path / "model.onnx") as runner:
        expected = runner.infer(images)
    for _ in range(2):  # the second time from the cache
        with OpenVinoRunner(tmp_path / "model.xml", settings) as runner:
            for count in (9, 2, 1, 7, 3, 5, 9, 3):
                np.testing.assert_allclose(runner.infer(images[:count]), expected[:count], atol=1e-5)
        assert len(list(settings.cache.iterdir())) == MOST_COMPILED + 1  # 1, 9, 2, 7, and what takes 3 and 5
    with pytest.raises(InputRejected, match="it is closed"):
        runner.infer(images[:6])


def test_what_its_files_become_changes_no_answer(tmp_path: Path) -> None:
    """It is compiled for another number of images later; a model that lies in its place by then is not that."""
    write_onnx(tmp_path / "model.onnx", weight())
    save_ir(tmp_path / "model.onnx", tmp_path / "model.xml")
    images = RNG.standard_normal((3, 3, SIZE, SIZE)).astype(np.float32)
    with OrtRunner(tmp_path / "model.onnx") as reference:
        expected = reference.infer(images)
    with OpenVinoRunner(tmp_path / "model.xml", ONE_THREAD) as runner:
        weights = tmp_path / "model.bin"
        weights.write_bytes(bytes(weights.stat().st_size))
        np.testing.assert_allclose(runner.infer(images), expected, atol=1e-5)


def test_a_model_that_no_other_batch_goes_through_is_compiled_as_it_is(tmp_path: Path) -> None:
    """Two images are one row: OpenVINO cannot give it another number of them."""
    rows = helper.make_node("Reshape", ["images", "shape"], ["logits"])
    shape = numpy_helper.from_array(np.array([1, 2 * CLASSES]), "shape")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in (("images", ["batch", 1, 1, CLASSES]), ("logits", [1, 2 * CLASSES]))
    ]
    graph = helper.make_graph([rows], "pair", ends[:1], ends[1:], [shape])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "pair.onnx")
    with OpenVinoModel(tmp_path / "pair.onnx", ONE_THREAD) as model:
        np.testing.assert_array_equal(model.run(np.ones((2, 1, 1, CLASSES), dtype=np.float32)), np.ones((1, 2 * CLASSES)))


def test_by_the_hint_throughput_parts_of_a_batch_run_at_once(tmp_path: Path) -> None:
    write_onnx(tmp_path / "model.onnx", weight())
    write_onnx(tmp_path / "fixed.onnx", weight(), batch=4)
    images = RNG.standard_normal((7, 3, SIZE, SIZE)).astype(np.float32)
    settings = OpenVinoSettings(hint="throughput", threads=2)
    with OpenVinoRunner(tmp_path / "model.onnx", ONE_THREAD) as one, OpenVinoRunner(tmp_path / "model.onnx", settings) as many:
        assert (one.at_once, many.at_once > 1) == (1, (os.cpu_count() or 1) > 1)
        for count in (1, 2, 7):
            np.testing.assert_allclose(many.infer(images[:count]), one.infer(images[:count]), atol=1e-5)
        with pytest.raises(InputRejected, match=r"OpenVINO cannot run it on \(1, 3, 9, 9\)"):
            many.run_at_once([np.zeros((1, 3, 9, 9), dtype=np.float32)] * many.at_once)
        np.testing.assert_allclose(many.infer(images), one.infer(images), atol=1e-5)  # as well as before
    with OpenVinoRunner(tmp_path / "fixed.onnx", settings) as fixed:
        assert fixed.infer(images[:4]).shape == (4, CLASSES)


def test_threads_may_share_a_runner(tmp_path: Path) -> None:
    """Without turns a graph is given one shape and compiled in another, and an answer is read when it is overwritten."""
    size = 64
    rng = np.random.default_rng(1)
    filters = numpy_helper.from_array(rng.standard_normal((32, 3, 3, 3)).astype(np.float32), "filters")
    nodes = [
        helper.make_node("Conv", ["images", "filters"], ["maps"], pads=[1] * 4),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["means"]),
        helper.make_node("Flatten", ["means"], ["logits"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in (("images", ["batch", 3, size, size]), ("logits", ["batch", 32]))
    ]
    graph = helper.make_graph(nodes, "shared", ends[:1], ends[1:], [filters])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "shared.onnx")
    asked = [rng.standard_normal((count, 3, size, size)).astype(np.float32) for count in (2, 2, 3, 3, 4, 5)] * 20
    with OrtRunner(tmp_path / "shared.onnx") as reference:
        expected = [reference.infer(images) for images in asked]
    with OpenVinoRunner(tmp_path / "shared.onnx", ONE_THREAD) as runner, ThreadPoolExecutor(6) as threads:
        for answers, right in zip(threads.map(runner.infer, asked), expected, strict=True):
            np.testing.assert_allclose(answers, right, atol=1e-4)


def test_as_many_run_at_once_for_any_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO finds fewer best where each takes more memory, which needs more cores than a test has: so it is told here."""
    write_onnx(tmp_path / "model.onnx", weight())
    compiled, best = GraphCompiler.compiled, iter((4, 1))

    def told(compiler: GraphCompiler, rows: int | None) -> Any:
        network, many = compiled(compiler, rows), next(best)
        answers = {"OPTIMAL_NUMBER_OF_INFER_REQUESTS": many}
        return SimpleNamespace(
            get_property=lambda name: answers.get(name) or network.get_property(name),
            create_infer_request=network.create_infer_request,
        )

    monkeypatch.setattr(GraphCompiler, "compiled", told)
    images = RNG.standard_normal((8, 3, SIZE, SIZE)).astype(np.float32)
    with OrtRunner(tmp_path / "model.onnx") as reference:
        expected = reference.infer(images)
    with OpenVinoRunner(tmp_path / "model.onnx", OpenVinoSettings(hint="throughput", threads=1)) as runner:
        np.testing.assert_allclose(runner.infer(images), expected, atol=1e-5)


def biased_attention(tokens: int, width: int) -> onnx.ModelProto:
    """One attention whose key bias is a constant of one row, as merged tokens have it; logits are the mean of its output."""
    rng = np.random.default_rng(3)
    names = {"q": (3, width), "k": (3, width), "v": (3, CLASSES)}
    weights = [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), n) for n, shape in names.items()]
    bias = np.log(rng.integers(1, 30, tokens)).astype(np.float32)
    nodes = [
        helper.make_node("Reshape", ["image", "flat"], ["tokens3"]),
        helper.make_node("Transpose", ["tokens3"], ["x"], perm=[0, 2, 1]),
        *(helper.make_node("MatMul", ["x", name], [f"x{name}"]) for name in names),
        helper.make_node("Transpose", ["xk"], ["keys"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["xq", "keys"], ["scores"]),
        helper.make_node("Add", ["scores", "bias"], ["biased"]),
        helper.make_node("Softmax", ["biased"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "xv"], ["mixed"]),
        helper.make_node("ReduceMean", ["mixed", "axis"], ["logits"], keepdims=0),
    ]
    constants = [
        numpy_helper.from_array(np.array([0, 3, tokens]), "flat"),
        numpy_helper.from_array(np.array([1]), "axis"),
        numpy_helper.from_array(bias, "bias"),
    ]
    size = round(tokens**0.5)
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [*weights, *constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_key_bias_of_one_row_is_computed_in_float32(tmp_path: Path) -> None:
    """In bfloat16, which OpenVINO takes by itself where the processor has it, it answers this wrongly."""
    onnx.save(biased_attention(64, 32), tmp_path / "model.onnx")
    images = RNG.standard_normal((3, 3, 8, 8)).astype(np.float32)
    with OpenVinoRunner(tmp_path / "model.onnx") as runner, OrtRunner(tmp_path / "model.onnx") as reference:
        np.testing.assert_allclose(runner.infer(images), reference.infer(images), atol=1e-4)


def attention(heads: int, queries: int, tokens: int, width: int, batch: int | str = "batch") -> onnx.ModelProto:
    """Self-attention of the first ``queries`` of ``tokens`` tokens, of their packed qkv (b, tokens, 3 heads width)."""
    shapes = {"apart": [0, tokens, 3, heads, width], "flat": [0, queries, heads * width]}
    numbers = {name: [value] for value, name in enumerate(("zero", "one", "two", "three"))}
    nodes = [
        helper.make_node("Reshape", ["packed", "apart"], ["qkv"]),
        helper.make_node("Transpose", ["qkv"], ["parts"], perm=[2, 0, 3, 1, 4]),
        *(
            helper.make_node("Slice", ["parts", start, end, "zero"], [f"{name}1"])
            for name, start, end in (("q", "zero", "one"), ("k", "one", "two"), ("v", "two", "three"))
        ),
        *(helper.make_node("Squeeze", [f"{name}1", "zero"], [name]) for name in "qkv"),
        helper.make_node("Slice", ["q", "zero", "most", "two"], ["queries"]),
        helper.make_node("Transpose", ["k"], ["keys"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["queries", "keys"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "flat"], ["out"]),
    ]
    constants = {**shapes, **numbers, "most": [queries]}
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("packed", TensorProto.FLOAT, [batch, tokens, 3 * heads * width])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, queries, heads * width])],
        [numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("batch", ["batch", 8])
@pytest.mark.parametrize(("heads", "queries"), [(3, 3), (3, 4), (12, 12), (1, 1)])
def test_as_many_queries_as_heads_are_answered_rightly(heads: int, queries: int, batch: int | str, tmp_path: Path) -> None:
    path, tokens, width = tmp_path / "attention.onnx", 20, 16
    onnx.save(attention(heads, queries, tokens, width, batch), path)
    packed = RNG.standard_normal((8, tokens, 3 * heads * width)).astype(np.float32)
    q, k, v = packed.reshape(8, tokens, 3, heads, width).transpose(2, 0, 3, 1, 4)
    logits = q[:, :, :queries] @ k.swapaxes(2, 3)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    with OpenVinoModel(path, ONE_THREAD) as model:
        answers = model.run(packed)
    np.testing.assert_allclose(answers, mixed.swapaxes(1, 2).reshape(8, queries, -1), atol=1e-4)


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.onnx").write_bytes(b"not onnx")
    with pytest.raises(InputRejected, match=r"none\.onnx: OpenVINO cannot load it: .*[Uu]nable to read the model"):
        OpenVinoRunner(tmp_path / "none.onnx")
    with pytest.raises(InputRejected, match="is not a file"):
        OpenVinoRunner(tmp_path / "nowhere.onnx")
    write_onnx(tmp_path / "model.onnx", weight())
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, tmp_path / "free.onnx")
    with pytest.raises(InputRejected, match="expected one floating-point input"):
        OpenVinoRunner(tmp_path / "free.onnx")


def test_signals_are_survived_when_models_end_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    """With a ``Core`` each the process dies of the signal: see ``patchslim.openvino_compiler``."""
    write_onnx(tmp_path / "model.onnx", weight())
    code = (
        "import gc, os, pathlib, signal, sys\n"
        "from patchslim.openvino_runner import OpenVinoRunner\n"
        "from patchslim.openvino_settings import OpenVinoSettings\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None)\n"
        "open_one = lambda: OpenVinoRunner(pathlib.Path(sys.argv[1]), OpenVinoSettings(threads=1))\n"
        "first, second = open_one(), open_one()\n"
        "del first; gc.collect(); del second; gc.collect()\n"
        "os.kill(os.getpid(), signal.SIGCHLD); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model.onnx"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_without_openvino_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['openvino'] = None\n"
        "from patchslim.openvino_runner import OpenVinoRunner\n"
        "from patchslim.errors import Unavailable\n"
        "try: OpenVinoRunner(b'')\n"
        "except Unavailable as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 'OpenVINO is not installed; install it: pip install ".[openvino]"' in done.stdout, done.stderr
