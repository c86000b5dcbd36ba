"""Graphs as people have them: old opsets, functions, fused and unsorted nodes, Einsum, prepared images, quantised ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from graph_passes import OnnxModel, load_model, save_model, slim
from graph_passes.onnx_io.standard_form import standard_form
from patchslim.errors import InputRejected
from tests.helpers.attacks.vit import BLOCK, GRAPH, INTEGERS, WEIGHTS, parsed, plan, tiny_vit

pytestmark = pytest.mark.numeric

IMAGES = np.random.default_rng(1).standard_normal((3, 3, 8, 8), dtype=np.float32)


def answers(model: OnnxModel | onnx.ModelProto, images: NDArray[np.generic] = IMAGES) -> NDArray[np.float32]:
    """Logits by ONNX Runtime, which optimises nothing."""
    proto = model.to_proto() if isinstance(model, OnnxModel) else model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {proto.graph.input[0].name: images})[0]
    return result


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def assert_cut_as_the_plain_one(model: onnx.ModelProto, folder: Path, atol: float = 1e-5) -> None:
    """The graph answers as ``tiny_vit``, dense and cut, and a second cut changes nothing."""
    np.testing.assert_allclose(answers(model), answers(tiny_vit()), rtol=0, atol=atol)
    cut = slim(load_model(saved(model, folder)), plan())
    np.testing.assert_allclose(answers(cut.model), answers(slim(tiny_vit(), plan()).model), rtol=0, atol=atol)
    assert {node.domain for node in cut.model.graph.node} == {""}
    assert not slim(cut.model, plan()).modified


def replaced(block: Callable[[int], str], graph: str = GRAPH) -> onnx.ModelProto:
    """``tiny_vit`` with other text for each block, and ONNX Runtime's operators imported."""
    for index in (0, 1):
        graph = graph.replace(BLOCK.format(i=index, j=index + 1), block(index))
    model = parsed(graph, WEIGHTS, INTEGERS)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "root"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def between(text: str, first: str, last: str, new: str) -> str:
    """``text`` with what is from ``first`` up to ``last`` replaced."""
    start, end = text.index(first), text.index(last)
    return text[:start] + new + text[end:]


def test_a_graph_in_this_form_is_returned_as_it_is() -> None:
    model = OnnxModel.from_proto(tiny_vit())
    assert standard_form(model) == (model, [])


def test_nodes_in_any_order_are_sorted(tmp_path: Path) -> None:
    model = tiny_vit()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    with pytest.raises(onnx.checker.ValidationError, match="sorted"):
        onnx.checker.check_model(model)
    assert_cut_as_the_plain_one(model, tmp_path)
    assert standard_form(OnnxModel.from_proto(model))[1] == ["nodes put in topological order"]


def test_what_the_usual_fp16_converter_leaves_is_understood(tmp_path: Path) -> None:
    convert = pytest.importorskip("onnxruntime.transformers.float16").convert_float_to_float16
    half = convert(tiny_vit(), keep_io_types=True)
    nodes = list(half.graph.node)
    made = {name for node in nodes for name in node.output}
    ready: set[str] = set()
    unsorted = False
    for node in nodes:
        unsorted |= any(name in made - ready for name in node.input)
        ready.update(node.output)
    assert unsorted, "the converter sorts its nodes now"
    cut = slim(load_model(saved(half, tmp_path)), plan())
    np.testing.assert_allclose(answers(cut.model), answers(slim(tiny_vit(), plan()).model), rtol=0, atol=0.1)


def test_local_functions_are_inlined_functions_that_call_functions_too(tmp_path: Path) -> None:
    model = tiny_vit()
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    gelu = helper.make_function("own", "Inner", ["x"], ["y"], [helper.make_node("Gelu", ["x"], ["y"])], opsets)
    inner = [helper.make_node("Inner", ["x"], ["z"], domain="own"), helper.make_node("Identity", ["z"], ["y"])]
    model.functions.extend([gelu, helper.make_function("own", "Outer", ["x"], ["y"], inner, opsets)])
    model.opset_import.append(helper.make_opsetid("own", 1))
    for node in model.graph.node:
        if node.op_type == "Gelu":
            node.op_type, node.domain = "Outer", "own"
    assert_cut_as_the_plain_one(model, tmp_path)


def _packed(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the weights of queries, keys and values of each block side by side, and biases of zeros."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for block in (0, 1):
        packed = np.concatenate([arrays[f"w{part}{block}"] for part in "qkv"], axis=1)
        model.graph.initializer.append(numpy_helper.from_array(packed, f"wqkv{block}"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(24, np.float32), "no_bias"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(16, np.float32), "no_hidden_bias"))
    return model


def _attention(index: int) -> str:
    fused = f"ar{index} = com.microsoft.Attention <num_heads = 2, scale = 0.5> (n{index}, wqkv{index}, no_bias)\n "
    return between(BLOCK, "q{i} =", "o{i} =", fused).format(i=index, j=index + 1)


def _multi_head(index: int) -> str:
    products = " ".join(f"{part}{index} = MatMul(n{index}, w{part}{index})" for part in "qkv")
    fused = f"ar{index} = com.microsoft.MultiHeadAttention <num_heads = 2> (q{index}, k{index}, v{index})"
    return between(BLOCK, "q{i} =", "o{i} =", f"{products} {fused}\n ").format(i=index, j=index + 1)


def _multi_head_biased(index: int) -> str:
    return _multi_head(index).replace(f"k{index}, v{index})\n", f"k{index}, v{index}, no_bias)\n")


def _skip_norm(index: int) -> str:
    fused = "m{i}, e{i}, f{i}, y{i} = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (x{i}, o{i}, scale, bias)\n "
    return between(BLOCK, "y{i} =", "u{i} =", fused).format(i=index, j=index + 1)


def _bias_gelu(index: int) -> str:
    return BLOCK.replace("Gelu(u{i})", "com.microsoft.BiasGelu(u{i}, no_hidden_bias)").format(i=index, j=index + 1)


def _gelu(index: int) -> str:
    return BLOCK.replace("Gelu(u{i})", "com.microsoft.Gelu(u{i})").format(i=index, j=index + 1)


def _products(index: int) -> str:
    """Scores by a product that transposes and scales."""
    text = BLOCK.replace("kt{i} = Transpose <perm = [0, 2, 3, 1]>", "kt{i} = Transpose <perm = [0, 2, 1, 3]>")
    fused = "s{i} = com.microsoft.FusedMatMul <transB = 1, alpha = 0.5> (qt{i}, kt{i})"
    text = text.replace("qs{i} = Mul(qt{i}, root)  s{i} = MatMul(qs{i}, kt{i})", fused)
    return text.format(i=index, j=index + 1)


FUSED = {
    "Attention": _attention, "MultiHeadAttention": _multi_head, "MultiHeadAttention, a bias": _multi_head_biased,
    "SkipLayerNormalization": _skip_norm, "BiasGelu": _bias_gelu, "Gelu": _gelu, "FusedMatMul": _products,
}  # fmt: skip


@pytest.mark.parametrize("kind", FUSED)
def test_what_onnx_runtime_fused_is_written_out_again(kind: str, tmp_path: Path) -> None:
    model = _packed(replaced(FUSED[kind]))
    assert {node.op_type for node in model.graph.node if node.domain} == {kind.split(",")[0]}
    assert_cut_as_the_plain_one(model, tmp_path)


@pytest.mark.parametrize("op", ["QuickGelu", "FastGelu"])
def test_other_gelus_answer_as_onnx_runtime_does(op: str, tmp_path: Path) -> None:
    model = replaced(lambda index: BLOCK.replace("Gelu(u{i})", f"com.microsoft.{op}(u{{i}})").format(i=index, j=index + 1))
    plain, _ = standard_form(OnnxModel.from_proto(model))
    assert {node.domain for node in plain.graph.node} == {""}
    np.testing.assert_allclose(answers(plain), answers(model), rtol=0, atol=1e-5)
    assert slim(load_model(saved(model, tmp_path)), plan()).modified


def test_a_norm_of_a_mean_square_is_written_out(tmp_path: Path) -> None:
    def block(index: int) -> str:
        fused = "com.microsoft.SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (x{i}, scale)"
        return BLOCK.replace("LayerNormalization <axis = -1> (x{i}, scale, bias)", fused).format(i=index, j=index + 1)

    model = replaced(block)
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = ""  # as ONNX Runtime writes it
    plain, _ = standard_form(OnnxModel.from_proto(model))
    np.testing.assert_allclose(answers(plain), answers(model), rtol=0, atol=1e-5)
    assert slim(load_model(saved(model, tmp_path)), plan()).modified


def test_what_onnx_runtime_itself_writes_is_understood(tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(tiny_vit().SerializeToString(), options, providers=["CPUExecutionProvider"])
    model = onnx.load(tmp_path / "optimised.onnx")
    assert any(node.domain == "com.microsoft" for node in model.graph.node)
    assert_cut_as_the_plain_one(model, tmp_path)


def test_a_fused_layer_normalization_of_an_old_opset_is_understood(tmp_path: Path) -> None:
    """ONNX Runtime writes it under ONNX's name, where ONNX has none."""
    model = replaced(_gelu)
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", 15), helper.make_opsetid("com.microsoft", 1)])
    with pytest.raises(onnx.checker.ValidationError, match="LayerNormalization"):
        onnx.checker.check_model(model)
    assert_cut_as_the_plain_one(model, tmp_path)


def test_a_fused_operator_that_stays_is_refused_with_the_tool_and_what_to_give_instead(tmp_path: Path) -> None:
    model = tiny_vit()
    next(node for node in model.graph.node if node.op_type == "Conv").domain = "com.microsoft.nchwc"
    model.opset_import.append(helper.make_opsetid("com.microsoft.nchwc", 1))
    with pytest.raises(InputRejected, match=r"Conv node.*ONNX Runtime's optimiser.*give the model as it was exported"):
        load_model(saved(model, tmp_path))
    causal = _packed(replaced(lambda index: _attention(index).replace("scale = 0.5", "scale = 0.5, unidirectional = 1")))
    with pytest.raises(InputRejected, match=r"Attention node.*ONNX Runtime's optimiser.*give the model as it was exported"):
        load_model(saved(causal, tmp_path))


def _einsum(index: int) -> str:
    """As Keras and JAX have it: heads as an axis of the weights."""
    layers = " ".join(f'{part}{index} = Einsum <equation = "abc,cde->abde"> (n{index}, h{part}{index})' for part in "qkv")
    scores = f'qs{index} = Mul(q{index}, root) s{index} = Einsum <equation = "aecd,abcd->acbe"> (k{index}, qs{index})'
    mixed = f'p{index} = Softmax <axis = -1> (s{index}) a{index} = Einsum <equation = "acbe,aecd->abcd"> (p{index}, v{index})'
    joined = f'o{index} = Einsum <equation = "abcd,cde->abe"> (a{index}, ho{index})'
    return between(BLOCK, "q{i} =", "y{i} =", f"{layers} {scores} {mixed} {joined}\n ").format(i=index, j=index + 1)


def test_an_attention_written_as_einsum_with_heads_as_an_axis_of_the_weights(tmp_path: Path) -> None:
    model = replaced(_einsum)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for part, block in itertools.product("qkvo", (0, 1)):
        shape = (2, 4, 8) if part == "o" else (8, 2, 4)
        model.graph.initializer.append(numpy_helper.from_array(arrays[f"w{part}{block}"].reshape(shape), f"h{part}{block}"))
    assert_cut_as_the_plain_one(model, tmp_path)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)]),
        ("ij,kj->ik", [(2, 3), (4, 3)]),
        ("ij,jk", [(2, 3), (3, 4)]),
        ("...ij,...jk->...ik", [(5, 2, 3), (5, 3, 4)]),
        ("...ij,...kj->...ik", [(5, 6, 2, 3), (5, 6, 4, 3)]),
        ("bqhd,bkhd->bhqk", [(2, 3, 4, 5), (2, 6, 4, 5)]),
        ("bhqk,bkhd->bqhd", [(2, 4, 3, 6), (2, 6, 4, 5)]),
        ("btnh,nhd->btd", [(2, 3, 4, 5), (4, 5, 6)]),
        ("btd,dnh->bnth", [(2, 3, 4), (4, 5, 6)]),
        ("ijk->kij", [(2, 3, 4)]),
    ],
)
def test_an_einsum_is_a_product_of_matrices(equation: str, shapes: list[tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    inputs = [helper.make_tensor_value_info(f"x{number}", 1, shape) for number, shape in enumerate(shapes)]
    node = helper.make_node("Einsum", [value.name for value in inputs], ["y"], equation=equation)
    wanted = np.einsum(equation, *values)
    outputs = [helper.make_tensor_value_info("y", 1, wanted.shape)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)])
    plain, changes = standard_form(OnnxModel.from_proto(model))
    assert changes
    assert not any(node.op_type == "Einsum" for node in plain.graph.node)
    proto = plain.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    proto.ir_version = 10
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {value.name: array for value, array in zip(inputs, values, strict=True)}
    np.testing.assert_allclose(session.run(None, feeds)[0], wanted, rtol=0, atol=1e-5)


def test_an_einsum_of_another_form_is_named(tmp_path: Path) -> None:
    model = replaced(lambda index: BLOCK.replace("MatMul(g{i}, wd{i})", "Gd{i}(g{i})").format(i=index, j=index + 1))
    for node in model.graph.node:
        if node.op_type.startswith("Gd"):
            node.input.append("wd" + node.op_type[-1])
            node.op_type = "Einsum"
            node.attribute.append(helper.make_attribute("equation", "abc,cd->d"))
    with pytest.raises(InputRejected, match=r"Einsum node.*'abc,cd->d'.*export the model with MatMul"):
        load_model(saved(model, tmp_path))


PREPARED = """
  floats = Cast <to = 1> (images)  moved = Transpose <perm = [0, 3, 1, 2]> (floats)
  resized = Resize <mode = "linear"> (moved, , , sizes_to)  unit = Div(resized, most)  ready = Sub(unit, means)
"""


def test_images_that_the_graph_prepares_itself_need_not_be_understood(tmp_path: Path) -> None:
    """Bytes of any size, channels last, resized and normalised ahead of the embedding, in FP32 and in FP16."""
    graph = GRAPH.replace("float[batch, 3, 8, 8] images", "uint8[1, rows_in, columns_in, 3] images")
    graph = graph.replace("(images, patch)", "(ready, patch)").replace("{\n", "{\n" + PREPARED, 1)
    model = parsed(graph, WEIGHTS, INTEGERS | {"sizes_to": [1, 3, 8, 8]})
    numbers = {"root": 0.5, "most": 255.0, "means": [[[[0.4]], [[0.5]], [[0.6]]]]}
    for name, value in numbers.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    pixels = np.random.default_rng(3).integers(0, 256, (1, 13, 11, 3), dtype=np.uint8)
    ready = ort_value(model, "ready", pixels)
    cut = slim(load_model(saved(model, tmp_path)), plan())
    wanted = answers(slim(tiny_vit(), plan()).model, ready)
    np.testing.assert_allclose(answers(cut.model, pixels), wanted, rtol=0, atol=1e-5)
    half = slim(cut.model, plan(), precision="fp16")
    np.testing.assert_allclose(answers(half.model, pixels), wanted, rtol=0, atol=2e-2)
    assert not slim(half.model, plan(), precision="fp16").modified
    with pytest.raises(InputRejected, match=r"prepares its images itself.*leave out --image"):
        slim(cut.model, plan(), image="uint8-nchw", mean=(0.5,) * 3, std=(0.5,) * 3)


def ort_value(model: onnx.ModelProto, name: str, images: NDArray[np.generic]) -> NDArray[np.generic]:
    """What a tensor inside the graph holds."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.insert(0, helper.make_tensor_value_info(name, 1, None))
    return answers(shown, images)


class Calibration:
    """Images for onnxruntime's static quantisation."""

    def __init__(self) -> None:
        self._left: Iterator[NDArray[np.float32]] = iter([IMAGES])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        images = next(self._left, None)
        return None if images is None else {"images": images}


@pytest.mark.parametrize("kind", ["dynamic", "QDQ", "QOperator"])
def test_a_quantised_graph_is_refused_with_the_order_to_do_it_in(kind: str, tmp_path: Path) -> None:
    quantisation = pytest.importorskip("onnxruntime.quantization")
    source, target = saved(tiny_vit(), tmp_path), tmp_path / "quantised.onnx"
    if kind == "dynamic":
        quantisation.quantize_dynamic(source, target)
    else:
        form = getattr(quantisation.QuantFormat, kind)
        quantisation.quantize_static(source, target, Calibration(), quant_format=form)
    with pytest.raises(InputRejected, match=r"the graph is quantised; cut first, then quantise"):
        load_model(target)


def test_a_renamed_data_file_is_named_with_what_lies_beside_the_model(tmp_path: Path) -> None:
    save_model(tiny_vit(), tmp_path / "model.onnx", external=True)
    (data,) = tmp_path.glob("*.data")
    data.rename(tmp_path / "weights.bin")
    with pytest.raises(InputRejected, match=rf"is missing: '{data.name}'.*there is 'weights.bin': give the file back"):
        load_model(tmp_path / "model.onnx")
