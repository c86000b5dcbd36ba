"""Latency tables measured: real runs of a tiny model's blocks, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from export.latency.conditions import TimingConditions
from export.latency.measure import measure_table
from export.onnx_export import export_dense
from graph_passes import OnnxModel, load_model, save_model
from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.latency_table import load_table
from patchslim.plan import SlimPlan
from slimming.api import dense_plan
from tests.helpers.onnx_models import dense, plan_for
from tests.helpers.timm_models import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["plain", "registers"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SlimPlan]:
    model, exported = dense(request.param)
    path = tmp_path_factory.mktemp(request.param) / "dense.onnx"
    save_model(exported, path)
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    return path, plan_for(model, [list(range(tokens))] * 4)


@pytest.mark.parametrize(("mode", "layout", "precision"), [("compact", "split", "fp32"), ("stale", "packed", "fp16")])
def test_a_tiny_model_is_measured(tiny: tuple[Path, SlimPlan], mode: Any, layout: Any, precision: Any, tmp_path: Path) -> None:
    path, plan = tiny
    seen: list[tuple[str, int, int]] = []
    found = measure_table(
        path,
        plan,
        TimingConditions(layout, mode, precision=precision, batch=2, threads=1),
        grid=[9],
        rounds=2,
        progress=lambda *report: seen.append(report),
    )
    assert (found.model, found.tokens, found.depth, found.batch, found.threads) == ("tiny", plan.tokens, 4, 2, 1)
    assert (found.mode, found.layout, found.precision, found.engine, found.repeats) == (mode, layout, precision, "ort", 2)
    counts = sorted({plan.tokens, 9, plan.prefix_tokens})
    reads = [plan.tokens] if mode == "stale" else counts
    wanted = {(n, k) for n in reads for k in {*counts, 1} if k <= n}
    assert {(point.tokens_in, point.tokens_out) for point in found.points} == wanted
    assert found.of([plan.tokens] * 4) == pytest.approx(found.dense_ms)
    assert found.of([13, 9, 9, 1]) <= found.dense()  # 13: between two that were measured
    assert {stage for stage, _, _ in seen} == {"cutting blocks to time", "timing blocks"}
    assert seen[-1][1] == seen[-1][2]
    found.save(tmp_path / "table.json")
    load_table(tmp_path / "table.json").ensure_fits(plan.model_copy(update={"mode": mode}), layout)
    with pytest.raises(InputRejected, match=r"measured for something else: .*layout"):
        found.ensure_fits(plan.model_copy(update={"mode": mode}), "packed" if layout == "split" else "split")


def test_what_is_timed_is_the_block_of_the_slim_model(tiny: tuple[Path, SlimPlan]) -> None:
    from export.latency.block_extraction import ModelParts

    path, plan = tiny
    for mode, outputs in (("compact", 9), ("stale", plan.tokens)):
        parts = ModelParts(path, plan, TimingConditions("split", mode, batch=2))  # type: ignore[arg-type]
        reads = 13 if mode == "compact" else plan.tokens
        block = parts.block(reads, 9)
        assert _shape(block.graph.input[0]) == [2, reads, 48]
        assert _shape(block.graph.output[0]) == [2, outputs, 48]
        assert [node.op_type for node in block.graph.node].count("Softmax") == 1
        # The matrix products of a cut block: queries, keys and values, scores, mix, projection, and the MLP's two.
        assert [node.op_type for node in block.graph.node].count("MatMul") == 7
        last = parts.block(reads, 1)
        assert _shape(last.graph.output[0]) == [2, 1, 48]
        ends = [parts.end(name) for name in ("stem", "head", "whole")]
        assert [_shape(end.graph.output[0]) for end in ends] == [[2, plan.tokens, 48], [2, 10], [2, 10]]
        softmaxes = [[node.op_type for node in end.graph.node].count("Softmax") for end in ends]
        assert softmaxes == [0, 0, 4]


def test_merging_blocks_are_timed_with_their_merges(tiny: tuple[Path, SlimPlan]) -> None:
    from export.latency.block_extraction import ModelParts

    path, plan = tiny
    parts = ModelParts(path, plan, TimingConditions("split", "compact", merged=True, batch=2))
    for reads, outputs, products, biases in ((plan.tokens, 13, 9, 0), (13, 9, 9, 1), (13, 1, 7, 1), (plan.tokens, 1, 7, 0)):
        block = parts.block(reads, outputs)
        assert (_shape(block.graph.input[0]), _shape(block.graph.output[0])) == ([2, reads, 48], [2, outputs, 48])
        operators = [node.op_type for node in block.graph.node]
        assert operators.count("MatMul") == products  # two more where tokens go into others: for queries and for the shortcut
        softmax = next(node for node in block.graph.node if node.op_type == "Softmax")
        made = {name: node.op_type for node in block.graph.node for name in node.output}
        assert (made[softmax.input[0]] == "Add") == bool(biases)  # what merged tokens weigh
    found = measure_table(path, plan, TimingConditions("split", "compact", merged=True, batch=1, threads=1), grid=[9], rounds=1)
    found.ensure_fits(plan, "split", merged=True)
    with pytest.raises(InputRejected, match="--score similarity goes with it"):
        found.ensure_fits(plan, "split")


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_shallow_model_is_measured(depth: int, tmp_path: Path) -> None:
    from export.latency.block_extraction import first_blocks

    model, exported = dense("plain")
    path = tmp_path / "dense.onnx"
    save_model(first_blocks(OnnxModel.from_proto(exported), depth), path)
    load_model(path)
    plan = plan_for(model, [list(range(17))] * depth)
    found = measure_table(path, plan, TimingConditions("split", "compact", batch=1, threads=1), grid=[9], rounds=1)
    assert {point.tokens_in for point in found.points} == ({17} if depth == 1 else {17, 9, 1})
    assert found.of([9, 1][-depth:]) > 0


def test_a_head_that_takes_its_batch_from_the_images_is_measured(tmp_path: Path) -> None:
    model = build("siglip", depth=2)
    export_dense(model, (3, 48, 48), tmp_path / "dense.onnx")
    plan = dense_plan(model, "tiny")
    found = measure_table(
        tmp_path / "dense.onnx", plan, TimingConditions("split", "compact", batch=2, threads=1), grid=[5], rounds=1
    )
    assert {point.tokens_in for point in found.points} == {9, 5, 1}
    assert found.of([9, 5]) > 0


@pytest.mark.parametrize(
    ("conditions", "changes", "fault"),
    [
        ({}, {"grid": [9, 40]}, "over 1 to 17 tokens"),
        ({}, {"grid": [0]}, "over 1 to 17 tokens"),
        ({"batch": 0}, {}, "at least 1 for batch"),
        ({"threads": 0}, {}, "at least 1 for threads"),
        ({}, {"rounds": 0}, "at least 1 for rounds"),
    ],
)
def test_an_impossible_measurement_is_refused(
    conditions: dict[str, Any], changes: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    model, exported = dense("plain")
    save_model(exported, tmp_path / "dense.onnx")
    plan = plan_for(model, [list(range(17))] * 4)
    with pytest.raises(UsageError, match=fault):
        measure_table(tmp_path / "dense.onnx", plan, TimingConditions("split", "compact", **conditions), **changes)


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, exported = dense("plain")
    other = onnx.ModelProto()
    other.CopyFrom(exported)
    other.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    save_model(other, tmp_path / "fixed.onnx")
    plan = plan_for(model, [list(range(17))] * 4)
    with pytest.raises(InputRejected, match="fixed batch size 3"):
        measure_table(tmp_path / "fixed.onnx", plan, TimingConditions("split", "compact", batch=2))
    save_model(exported, tmp_path / "dense.onnx")
    for depth in (3, 5):
        wrong = plan_for(model, [list(range(17))] * depth)
        with pytest.raises(InputRejected, match=f"blocks: the graph has 4, the plan says {depth}"):
            measure_table(tmp_path / "dense.onnx", wrong, TimingConditions("split", "compact", batch=1), rounds=1)


def test_tensorrt_blocks_are_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    model, _ = dense("plain")
    plan = plan_for(model, [list(range(17))] * 4)
    with pytest.raises(Unavailable, match=r"latency budget for trt needs .* GPU.*--macs-reduction.*measured elsewhere"):
        measure_table(tmp_path / "any.onnx", plan, TimingConditions("packed", "compact", engine="trt"))


def test_tensorrt_builds_the_parts_that_it_would_time(tiny: tuple[Path, SlimPlan], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from export.latency.block_extraction import ModelParts
    from export.latency.timed_runs import TensorRtTimer

    path, plan = tiny
    parts = ModelParts(path, plan, TimingConditions("packed", "compact", merged=True, precision="fp16", batch=2))
    engine = TensorRtTimer("sm89", "fp16", 2)
    for number, key in enumerate(("stem", "head", (plan.tokens, 9))):
        parts.write(key, tmp_path / f"{number}.onnx")  # type: ignore[arg-type]
        assert engine.build(tmp_path / f"{number}.onnx").stat().st_size > 1000
    assert engine.version
    engine.close()


def test_costs_and_tables_load_neither_torch_nor_onnx() -> None:
    names = "slimming.search.costs, patchslim.latency_table, export.latency.measure"
    code = f"import sys, {names}; print(*{{'torch', 'onnx', 'onnxruntime', 'timm'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
