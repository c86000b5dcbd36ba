"""Reading TensorRT's list of kernels, from a recorded message of TensorRT-RTX 1.7.1 (a ViT of two blocks, fp16, sm120)."""

from pathlib import Path

import pytest

from export.engines.tensorrt_layers import count_fused_attentions, count_kernels, narrow_share, parse_layers

RECORDED = (Path(__file__).parents[1] / "fixtures" / "tensorrt_rtx_layers.txt").read_text()


def test_recorded_message_is_read_in_full() -> None:
    kernels = parse_layers(RECORDED)
    assert [kernel["type"] for kernel in kernels] == ["shape_call", "kgen", "kgen", "runtime_fusion", "gemm"]
    assert count_kernels(kernels) == 4
    attention = kernels[2]
    assert attention["name"] == "_gemm_mha_v2_myl0_8"
    assert attention["tactic"].startswith("_gemm_mha_v2_0x")
    assert attention["onnx_nodes"] == ["node_matmul_1", "node_softmax", "node_matmul"]
    assert [tensor["shape"] for tensor in attention["inputs"]] == [[-1, 17, 32], [-1, 32, 17], [-1, 17, 32]]
    assert attention["outputs"] == [{"name": "__mye32235_myl0", "shape": [-1, 17, 32], "dtype": "Half"}]
    assert all(kernel["outputs"] for kernel in kernels[1:])


def test_the_share_of_tensors_of_16_bits() -> None:
    kernels = parse_layers(RECORDED)
    tensors = [tensor["dtype"] for kernel in kernels for tensor in (*kernel["inputs"], *kernel["outputs"])]
    assert narrow_share(kernels) == tensors.count("Half") / len(tensors) > 0.8
    wide = [{**kernel, "inputs": [{**one, "dtype": "Float"} for one in kernel["inputs"]], "outputs": []} for kernel in kernels]
    assert narrow_share(wide) == 0
    assert narrow_share(kernels[:1]) is None  # what is computed on the host


def test_an_attention_counts_once_however_many_kernels_carry_it() -> None:
    kernels = parse_layers(RECORDED)
    assert count_fused_attentions(kernels, ["node_softmax", "node_softmax_1"]) == 1
    again = {**kernels[2], "name": "_gemm_mha_v2_myl0_9"}
    assert count_fused_attentions([*kernels, again], ["node_softmax", "node_softmax_1"]) == 1


@pytest.mark.parametrize("names", [["", ""], ["softmax", "softmax"], ["renamed", "renamed_1"]])
def test_kernels_are_counted_where_node_names_tell_nothing(names: list[str]) -> None:
    kernel = parse_layers(RECORDED)[2]
    second = {**kernel, "name": "_gemv_mha_v1_myl0_18"}
    assert count_fused_attentions([kernel, kernel, second], names) == 2


def test_a_kernel_named_after_an_onnx_node_called_mha_is_not_an_attention() -> None:
    gemm = {**parse_layers(RECORDED)[4], "name": "/blocks.0/mha/MatMul_myl0_4", "onnx_nodes": ["/blocks.0/mha/MatMul"]}
    assert count_fused_attentions([gemm], ["/blocks.0/mha/Softmax"]) == 0


@pytest.mark.parametrize(
    "message", ["", "Layers:\n", "Engine Layer Information:\n", "Layers:\nLayer(Myelin): a, Tactic: 0x1\n"]
)
def test_an_unknown_form_is_refused_not_counted_as_zero(message: str) -> None:
    with pytest.raises(ValueError, match="layers"):
        parse_layers(message)
