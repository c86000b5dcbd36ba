"""What needs a GPU: the driver's calls, and a plan that is found, fitted and fine-tuned there. Skipped without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

from patchslim import cuda
from slimming.distributed import ProcessGroup, close_process_group, open_process_group
from tests.helpers.commands import door_here

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
PLAN = [
    "--model",
    "vit_ti",
    "--data",
    "digits",
    "--calibration-images",
    "64",
    "--macs-reduction",
    "0.45",
    "--eval-images",
    "64",
]


def test_the_driver_names_the_gpu_and_brings_back_what_it_was_given() -> None:
    major, minor = torch.cuda.get_device_capability()
    assert cuda.local_target() == f"sm{major}{minor}"
    assert cuda.device_name() == torch.cuda.get_device_name(0)
    driver, built_for = cuda.driver_version(), torch.version.cuda
    assert driver is not None
    assert built_for is not None
    assert int(driver.partition(".")[0]) >= int(built_for.partition(".")[0])
    stream = cuda.Stream()
    given, found = np.arange(1 << 20, dtype=np.float32), np.zeros(1 << 20, dtype=np.float32)
    address = stream.allocate(given.nbytes)
    stream.upload(address, given)
    stream.download(found, address)
    assert np.array_equal(given, found)
    stream.free(address)
    stream.close()


def test_events_take_the_time_of_what_lies_between_them() -> None:
    stream = cuda.Stream()
    array = np.zeros(1 << 24, dtype=np.float32)
    address, start, middle, end = stream.allocate(array.nbytes), stream.event(), stream.event(), stream.event()
    stream.upload(address, array)
    stream.record(start)
    stream.upload(address, array[: 1 << 10])
    stream.record(middle)
    for _ in range(8):
        stream.upload(address, array)
    stream.record(end)
    little, much = stream.seconds_between(start, middle), stream.seconds_between(middle, end)
    assert 0 < little < much < 10
    stream.free(address)
    stream.close()


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan that the CPU finds."""
    output = tmp_path_factory.mktemp("cpu") / "plan.json"
    found = door_here([sys.executable, "-m", "slimming.run", *PLAN, "--device", "cpu", "-o", str(output)])
    assert found.returncode == 0, found.stderr[-3000:]
    return output


def test_a_gpu_finds_the_plan_that_a_cpu_finds(on_cpu: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    found = door_here([sys.executable, "-m", "slimming.run", *PLAN, "--device", "cuda", "-o", str(output)])
    assert found.returncode == 0, found.stderr[-3000:]
    ours, theirs = json.loads(output.read_text()), json.loads(on_cpu.read_text())
    assert [len(kept) for kept in ours["kept"]] == [len(kept) for kept in theirs["kept"]]
    assert ours["kept"] == theirs["kept"]
    assert ours["merged_into"] == theirs["merged_into"]
    fitted, wanted = (load_file(plan.with_name(json.loads(plan.read_text())["weights"]["file"])) for plan in (output, on_cpu))
    for name, value in wanted.items():
        assert torch.allclose(fitted[name], value, atol=2e-3, rtol=2e-2), name


def test_a_run_under_torchrun_with_one_process_for_each_gpu(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torch.cuda.device_count())]
    finetuning = ["--finetune-epochs", "1", "--train-images", "128", "--finetune-precision", "bf16"]
    words = [sys.executable, *torchrun, "-m", "slimming.run", *PLAN, *finetuning, "--device", "cuda", "-o", str(output)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    }
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    assert json.loads(output.read_text())["weights"]["finetune"]["steps"] >= 1


def test_sums_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29563"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("nccl", rank=0, world_size=1)
    try:
        assert open_process_group("cuda").size == 1
        parts = [torch.arange(6.0, device="cuda").view(2, 3) + index for index in range(3)]
        gathered = ProcessGroup()._gathered(parts, [0, 1, 2])  # as it is with more processes
        assert all(torch.equal(found, part.double().cpu()) for found, part in zip(gathered, parts, strict=True))
    finally:
        close_process_group()
