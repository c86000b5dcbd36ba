"""Real TensorRT builds of a ViT of two blocks, and every refusal; TensorRT-RTX builds them without a GPU."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from export.engines.base import BuildProgress, BuildSettings
from export.engines.build import build_engine
from export.engines.tensorrt_build import choose_backend
from patchslim import cuda
from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.packages import install_command
from patchslim.tensorrt_runner import TrtRunner, can_execute

DEPTH = 2
ROOT = Path(__file__).resolve().parents[2]
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason=f"tensorrt_rtx is not installed: {install_command('rtx')}"
)
ahead_of_time = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None and cuda.local_target() is not None,
    reason="full TensorRT and a GPU are here: engines are built for that GPU, not ahead of time",
)


def export_vit(path: Path, dtype: torch.dtype) -> Path:
    import timm

    torch.manual_seed(0)
    shape = {"depth": DEPTH, "embed_dim": 64, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 10}
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = timm.create_model("vit_tiny_patch16_224", **shape).eval().to(dtype)
    finally:
        timm.layers.set_fused_attn(bool(before))
    torch.onnx.export(
        model,
        (torch.randn(2, 3, 32, 32, dtype=dtype),),
        path,
        dynamo=True,
        opset_version=20,
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
    )
    return path


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_vit(tmp_path_factory.mktemp("fp16") / "model.onnx", torch.float16)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_vit(tmp_path_factory.mktemp("fp32") / "model.onnx", torch.float32)


@needs_rtx
@ahead_of_time
def test_fp16_builds_fuse_every_attention_and_are_repeatable(fp16: Path, tmp_path: Path) -> None:
    reports: list[BuildProgress] = []
    result = build_engine("trt", fp16, tmp_path / "a", targets=["sm89", "sm86"], progress=reports.append)
    assert (result.backend, result.targets, result.precision) == ("tensorrt_rtx", ["sm89", "sm86"], "fp16")
    assert (result.fused_attentions, result.attentions) == (DEPTH, DEPTH)
    assert [path.name for path in result.files] == ["model.sm89.engine", "model.sm86.engine"]
    assert re.match(r"\d+\.\d+", result.version)

    assert result.layers_file is not None
    layers = json.loads(result.layers_file.read_text())
    assert list(layers) == ["sm89", "sm86"]
    for target, content in layers.items():
        assert content["fused_attentions"] == content["attentions"] == DEPTH
        kernels = [kernel for kernel in content["kernels"] if kernel["type"] != "shape_call"]
        assert len(kernels) == result.kernels[target]
        assert all(kernel["outputs"] and kernel["onnx_nodes"] for kernel in kernels)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "model.sm89.engine",
        "model.sm86.engine",
        "engine_layers.json",
    }

    assert {report.target for report in reports} == {"sm89", "sm86"}
    assert all(0 <= report.step <= report.total for report in reports)
    assert any(report.parent is None and report.step == report.total for report in reports)

    again = build_engine("trt", fp16, tmp_path / "b", targets=["sm86"])
    assert again.files[0].read_bytes() == result.files[1].read_bytes()


@needs_rtx
@ahead_of_time
@pytest.mark.skipif(cuda.local_target() is not None, reason="a GPU is visible: the engine may run")
def test_an_engine_that_could_not_run_is_not_called_executed(fp16: Path, tmp_path: Path) -> None:
    result = build_engine("trt", fp16, tmp_path, targets=["sm75"])
    assert not result.executed
    assert result.status == "built, not executed"
    assert "built, not executed (no CUDA driver or no visible GPU on this machine)" in result.summary()
    assert can_execute("tensorrt_rtx", ["sm75"])[0] is False
    with pytest.raises(Unavailable, match="no CUDA driver"):
        TrtRunner(result.files[0], "tensorrt_rtx")


@needs_rtx
@ahead_of_time
def test_the_portable_engine_is_another_and_as_fused(fp16: Path, tmp_path: Path) -> None:
    result = build_engine("trt", fp16, tmp_path)
    assert [file.name for file in result.files] == ["vit.fp16.portable.engine".replace("vit.fp16", fp16.stem)]
    assert (result.targets, result.fused_attentions, result.attentions) == (["portable"], DEPTH, DEPTH)
    alone = build_engine("trt", fp16, tmp_path / "alone", targets=["sm80"])
    assert result.files[0].read_bytes() != alone.files[0].read_bytes()
    assert result.kernels["portable"] == alone.kernels["sm80"]


@needs_rtx
@ahead_of_time
def test_fp32_builds_without_fused_attentions(fp32: Path, tmp_path: Path) -> None:
    result = build_engine("trt", fp32, tmp_path, targets=["sm120"], precision="fp32")
    assert (result.fused_attentions, result.attentions, result.precision) == (0, DEPTH, "fp32")
    assert result.files[0].stat().st_size > 0


@pytest.mark.slow
@needs_rtx
@ahead_of_time
def test_several_profiles_are_one_engine_whose_kernels_are_counted_once(fp16: Path, tmp_path: Path) -> None:
    alone = build_engine("trt", fp16, tmp_path / "alone", targets=["sm89"], batch=(1, 2, 4))
    profiles = ((1, 1, 1), (1, 2, 4))
    both = build_engine("trt", fp16, tmp_path / "both", targets=["sm89"], batch=(1, 2, 4), profiles=profiles)
    assert (both.batch, both.fused_attentions) == ((1, 2, 4), DEPTH)
    assert both.kernels["sm89"] < 1.5 * alone.kernels["sm89"]
    listed = json.loads((tmp_path / "both" / "engine_layers.json").read_text())["sm89"]["kernels"]
    assert sum(kernel["type"] != "shape_call" for kernel in listed) > 1.5 * alone.kernels["sm89"]  # those of both
    with pytest.raises(UsageError, match=r"batch \(3, 2, 4\): needs 1 <= smallest"):
        build_engine("trt", fp16, tmp_path / "not", targets=["sm89"], profiles=((3, 2, 4),))


@pytest.mark.slow
@needs_rtx
@ahead_of_time
def test_a_workspace_that_is_too_small_is_said(fp16: Path, tmp_path: Path) -> None:
    settings = BuildSettings(tf32=True, workspace=1, optimization_level=0)
    with pytest.raises(Unavailable, match=r"TensorRT-RTX did not build it for sm89: .*within workspace limit"):
        build_engine("trt", fp16, tmp_path / "out", targets=["sm89"], settings=settings)


@needs_rtx
@ahead_of_time
def test_fixed_batch_needs_no_profile(fp16: Path, tmp_path: Path) -> None:
    model = onnx.load(str(fp16))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, str(tmp_path / "fixed.onnx"))
    result = build_engine("trt", tmp_path / "fixed.onnx", tmp_path / "out", targets=["sm89"])
    assert result.batch == (4, 4, 4)


@needs_rtx
@ahead_of_time
def test_fp32_for_sm75_is_refused_with_the_next_step(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--precision fp16, or leave sm75 out"):
        build_engine("trt", fp32, tmp_path / "out", targets=["sm86", "sm75"], precision="fp32")
    assert not (tmp_path / "out").exists()


@needs_rtx
@ahead_of_time
def test_a_graph_that_the_parser_refuses_is_rejected_with_its_words(fp16: Path, tmp_path: Path) -> None:
    model = onnx.load(str(fp16))
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Softmagic"
    onnx.save(model, str(tmp_path / "odd.onnx"))
    with pytest.raises(InputRejected, match=r"odd\.onnx: TensorRT-RTX cannot read it: .*Softmagic"):
        build_engine("trt", tmp_path / "odd.onnx", tmp_path / "out", targets=["sm89"])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("content", [b"", b"\x08\x0a\x12\x07pytorch"])
def test_empty_onnx_is_rejected(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").write_bytes(content)
    with pytest.raises(InputRejected, match=r"empty\.onnx: an ONNX graph without nodes"):
        build_engine("trt", tmp_path / "empty.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_target_lists_the_valid_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown target sm33; valid targets are portable, sm75, sm80, .*, sm121"):
        choose_backend(["sm89", "sm33"])


@needs_rtx
@ahead_of_time
def test_one_engine_serves_many_by_default_and_repeats_are_dropped() -> None:
    assert choose_backend().targets == ("portable",)
    assert choose_backend(precision="int8").targets == ("portable",)
    assert choose_backend(precision="fp8").targets == ("sm89", "sm120", "sm121")
    assert choose_backend(["SM89", "sm80", "sm89"]).targets == ("sm89", "sm80")


def test_without_any_tensorrt_the_install_line_is_given() -> None:
    code = (
        "import sys; sys.modules['tensorrt'] = sys.modules['tensorrt_rtx'] = None\n"
        "from export.engines.tensorrt_build import choose_backend\n"
        "from patchslim.errors import Unavailable\n"
        "try: choose_backend(['sm89'])\n"
        "except Unavailable as error: print(error); sys.exit(error.exit_code)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 4, run.stderr
    assert install_command("rtx") in run.stdout
    assert install_command("trt") in run.stdout


def test_importing_engines_loads_no_backend() -> None:
    heavy = {"numpy", "onnx", "onnxruntime", "tensorrt_rtx", "torch"}
    code = f"import sys, export.engines; print({heavy} & set(sys.modules) or 'none')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "none"


def children() -> list[int]:
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def kill_worker(report: BuildProgress) -> None:
    before = [pid for pid in children() if b"tensorrt_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in before:
        os.kill(pid, signal.SIGKILL)


def interrupt(report: BuildProgress) -> None:
    raise KeyboardInterrupt


def cancel(report: BuildProgress) -> bool:
    return False


@needs_rtx
@ahead_of_time
@pytest.mark.parametrize(
    ("callback", "expected"), [(cancel, KeyboardInterrupt), (interrupt, KeyboardInterrupt), (kill_worker, Unavailable)]
)
def test_an_ended_build_leaves_nothing(
    callback: Callable[[BuildProgress], bool | None], expected: type[BaseException], fp16: Path, tmp_path: Path
) -> None:
    with pytest.raises(expected, match="SIGKILL" if expected is Unavailable else None):
        build_engine("trt", fp16, tmp_path, targets=["sm89", "sm86"], progress=callback)
    assert not list(tmp_path.iterdir())
    assert not [pid for pid in children() if b"tensorrt_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
