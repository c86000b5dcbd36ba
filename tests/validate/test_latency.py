"""The latency comparison and its command: which graph is faster by how much, and where the MAC ratio comes from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from patchslim.errors import InputRejected
from tests.helpers.attacks.bundle_graphs import write_bomb, write_constant_bomb, write_endless
from tests.helpers.bundles import Answer, make_bundle, plan, weight, write_onnx
from tests.helpers.validate_process import run
from validate import compare_latency
from validate.isolated import Limits

HEAVY = ("torch", "timm")


def write_tower(path: Path, layers: int, width: int = 768) -> None:
    """(batch, 3, 16, 16) -> ``layers`` square products: the work is proportional to ``layers``."""
    square = numpy_helper.from_array(np.eye(width, dtype=np.float32), "square")
    nodes = [helper.make_node("Flatten", ["image"], ["x0"])]
    nodes += [helper.make_node("MatMul", [f"x{i}", "square"], [f"x{i + 1}"]) for i in range(layers)]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, ["batch", width])],
        [square],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def bench(*arguments: object) -> Answer:
    return run(*arguments, module="benchmarks.latency", blocked=HEAVY)


def test_less_work_takes_less_time(tmp_path: Path) -> None:
    write_tower(tmp_path / "dense.onnx", 16)
    write_tower(tmp_path / "slim.onnx", 4)
    report = compare_latency(tmp_path / "dense.onnx", tmp_path / "slim.onnx", 4.0, batch=32, rounds=15)
    assert 1.5 < report.speedup < 10  # 4 on an idle machine; the bounds leave room for a busy one
    assert report.speedup_p10 <= report.speedup <= report.speedup_p90
    assert report.efficiency == pytest.approx(report.speedup / 4)
    assert report.meets_criterion == (report.efficiency >= 0.95)
    assert report.dense_ms > report.slim_ms > 0


def test_the_command(tmp_path: Path) -> None:
    write_tower(tmp_path / "dense.onnx", 2)
    write_tower(tmp_path / "slim.onnx", 1)
    plan().save(tmp_path / "plan.json")
    common = ["--dense", tmp_path / "dense.onnx", "--slim", tmp_path / "slim.onnx", "--rounds", 3]
    answer = bench(*common, "--plan", tmp_path / "plan.json", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["macs_ratio"] == pytest.approx(plan().dense_macs() / plan().macs())
    answer = bench(*common, "--macs-ratio", 1e6)
    assert answer.code == 0, answer.err
    assert "not met" in answer.out
    assert bench(*common, "--macs-ratio", 2, "--plan", "plan.json").code == 2
    assert bench(*common, "--plan", tmp_path / "dense.onnx").code == 3


def test_the_command_on_a_bundle(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    answer = bench("--dense", bundle / "model.onnx", "--bundle", bundle, "--rounds", 3, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["slim"] == "model.onnx"


@pytest.mark.parametrize(
    ("trap", "limits", "fault"),
    [
        (write_endless, Limits(timeout=2.0), "trap.onnx: did not answer within 2 s"),
        (write_bomb, Limits(), "trap.onnx: .*alloc"),
        (write_constant_bomb, Limits(), "trap.onnx: "),
    ],
)
def test_a_strangers_model_is_ended(tmp_path: Path, trap: Callable[[Path], object], limits: Limits, fault: str) -> None:
    trap(tmp_path / "trap.onnx")
    write_onnx(tmp_path / "dense.onnx", weight())
    started = time.monotonic()
    with pytest.raises(InputRejected, match=fault):
        compare_latency(tmp_path / "dense.onnx", tmp_path / "trap.onnx", rounds=2, limits=limits)
    assert time.monotonic() - started < 60


def test_files_that_cannot_be_compared(tmp_path: Path) -> None:
    write_tower(tmp_path / "dense.onnx", 1)
    write_onnx(tmp_path / "other.onnx", np.ones((192, 6), dtype=np.float32))
    with pytest.raises(InputRejected, match=r"missing\.onnx"):
        compare_latency(tmp_path / "dense.onnx", tmp_path / "missing.onnx")
    with pytest.raises(InputRejected, match=r"other\.onnx"):
        compare_latency(tmp_path / "dense.onnx", tmp_path / "other.onnx")
    write_onnx(tmp_path / "fixed.onnx", np.ones((192, 6), dtype=np.float32), batch=4)
    with pytest.raises(InputRejected, match="fixed batch size 4"):
        compare_latency(tmp_path / "other.onnx", tmp_path / "fixed.onnx")
