"""How much memory it takes to read, cut and write models whose weights stay in their files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm.layers
from onnx import TensorProto
from timm.models.vision_transformer import VisionTransformer

from graph_passes.onnx_io.files import read_model
from tests.helpers.linear_stacks import stack, values, write
from tests.helpers.onnx_models import plan_for, trace

MEMORY = """
import resource, sys
import numpy as np
from pathlib import Path
from graph_passes import load_model, save_model, slim
from graph_passes.onnx_io.files import read_model
from graph_passes.onnx_io.graph_convert import export_model, import_graph, with_shapes
from patchslim.plan import load_plan

def keep(source):
    model = read_model(source)
    return export_model(import_graph(with_shapes(model)), like=model)

def save(source):
    for external in (True, False):
        save_model(keep(source), source.with_name("out.onnx"), external=external)

def cut(source):
    plan = load_plan(source.with_suffix(".json"))
    save_model(slim(load_model(source), plan, precision="fp16").model, source.with_name("out.onnx"))

task, small, source, limit = globals()[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
task(small)  # what is imported late is imported now
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
try:
    np.ones(2 * limit, np.uint8)
except MemoryError:
    print("limited")
task(source)
"""


def wide(width: int, depth: int) -> onnx.ModelProto:
    """``stack`` with all weights of ``width x width`` in a file ``weights.bin`` that is not there."""
    model = stack(depth)
    for index, tensor in enumerate(model.graph.initializer):
        dims = [width] * len(tensor.dims)
        length = 4 * int(np.prod(dims))
        place = {"location": "weights.bin", "offset": index * 4 * width * width, "length": length}
        tensor.CopyFrom(TensorProto(name=tensor.name, data_type=1, dims=dims, data_location=TensorProto.EXTERNAL))
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[1].dim_value = width
    return model


def run_limited(task: str, small: Path, source: Path, limit: int) -> None:
    """Do a task of ``MEMORY`` with the model at ``source`` in ``limit`` bytes of private memory; ``small``: one to warm up."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, task, str(small), str(source), str(limit)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "limited" in done.stdout.split()


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited in the way of Linux")


@on_linux
@pytest.mark.parametrize("form", ["embedded", "external"])
def test_a_model_is_read_and_written_in_a_quarter_of_its_size(form: str, tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    rng = np.random.default_rng(0)
    with (tmp_path / "weights.bin").open("wb") as file:
        for _ in range(24):
            file.write(rng.integers(0, 2**30, 2**20, np.uint32).tobytes())
    onnx.save(wide(1024, 12), source)
    if form == "embedded":
        onnx.save(onnx.load(source), source)
        (tmp_path / "weights.bin").unlink()
    run_limited("save", write(tmp_path / "small.onnx", stack()), source, 12 * 2**20)
    assert (tmp_path / "out.onnx").stat().st_size > 48 * 2**20
    before, after = values(onnx.load(source)), values(onnx.load(tmp_path / "out.onnx"))
    for name, expected in before.items():
        np.testing.assert_array_equal(after[name], expected)


@on_linux
def test_a_model_of_three_gigabytes_passes_without_being_read(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(wide(16384, 3), source)
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(6 * 2**30)  # zeros that take no room on the disk
    assert read_model(source).nbytes > 3 * 2**30
    run_limited("keep", write(tmp_path / "small.onnx", stack()), source, 2**26)


@on_linux
def test_all_passes_take_less_memory_than_the_model_has(tmp_path: Path) -> None:
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        for name, width in (("small", 24), ("large", 768)):
            model = VisionTransformer(
                img_size=32, patch_size=8, embed_dim=width, depth=4, num_heads=3, mlp_ratio=2, num_classes=10
            )
            onnx.save(trace(model.eval()), tmp_path / f"{name}.onnx")
            plan_for(model, [list(range(17)), list(range(0, 17, 2)), [0, 4, 8], [0]]).save(tmp_path / f"{name}.json")
    finally:
        timm.layers.set_fused_attn(bool(before))
    size = (tmp_path / "large.onnx").stat().st_size
    assert size > 2**26
    run_limited("cut", tmp_path / "small.onnx", tmp_path / "large.onnx", size)
