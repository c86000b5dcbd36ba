"""Costs of plans: the table's surface, its sums and its refusals; rounded counts; a real measurement of a tiny model."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.latency.conditions import TimingConditions
from export.latency.measure import measure_table
from export.onnx_export import export_dense
from graph_passes import OnnxModel, load_model, save_model
from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.latency_table import LatencyTable, latency_table_schema, load_table
from patchslim.macs import Geometry, macs_of
from patchslim.plan import SlimPlan
from slimming.api import dense_plan
from slimming.search.costs import Cost, MacsCost, snap
from tests.helpers.onnx_models import dense, plan_for
from tests.helpers.timm_models import build

ROOT = Path(__file__).parents[2]
GEOMETRY = {"embed_dim": 48, "mlp_hidden_dim": 96, "patch_macs": 1000, "head_macs": 480}
READS, HEAD = [20, 12, 6, 3], 1  # three prefix tokens, of which the head reads one


def fields(ms: Any = lambda n, k: 0.1 * n + 0.2 * k + 0.01 * n * k, **changes: Any) -> dict[str, Any]:
    """A table as JSON has it, its times given by ``ms(tokens_in, tokens_out)``."""
    grid = [(n, k) for n in READS for k in [*READS, HEAD] if k <= n]
    points = [{"tokens_in": n, "tokens_out": k, "ms": ms(n, k)} for n, k in grid]
    names = {"model": "tiny", "engine": "ort", "engine_version": "1", "precision": "fp32", "device": "a processor"}
    sizes = {"tokens": 20, "depth": 4, "geometry": GEOMETRY, "mode": "compact", "layout": "split", "threads": 1, "batch": 8}
    times = {"points": points, "fixed_ms": 2.0, "dense_ms": 2.0 + 4 * points[0]["ms"], "repeats": 5, "spread": 0.1}
    return {"schema_version": 1, **names, **sizes, **times, **changes}


def table(ms: Any = lambda n, k: 0.1 * n + 0.2 * k + 0.01 * n * k, **changes: Any) -> LatencyTable:
    return LatencyTable.model_validate_json(json.dumps(fields(ms, **changes)))


def test_the_surface_meets_every_point_that_is_in_order() -> None:
    found = table()
    for point in found.points:
        assert found.block_ms(point.tokens_in, point.tokens_out) == pytest.approx(point.ms, abs=1e-12)


def test_between_points_it_is_bilinear() -> None:
    found = table(lambda n, k: 0.1 * n + 0.2 * k + 0.01 * n * k)
    for n, k in [(16, 9), (13, 5), (20, 2), (19, 12), (9, 2), (16, 3)]:  # cells that are whole
        assert found.block_ms(n, k) == pytest.approx(0.1 * n + 0.2 * k + 0.01 * n * k)
    plane = table(lambda n, k: 1 + 0.1 * n + 0.2 * k)
    for n in range(3, 21):  # the half cells along the diagonal too
        for k in range(1, n + 1):
            assert plane.block_ms(n, k) == pytest.approx(1 + 0.1 * n + 0.2 * k)


def test_below_the_grid_it_is_constant() -> None:
    found = table()
    assert found.block_ms(2, 1) == found.block_ms(3, 1)
    assert found.block_ms(2, 2) == found.block_ms(3, 2)


noisy = st.lists(st.floats(0.01, 10), min_size=14, max_size=14)


@given(noisy)
def test_more_tokens_never_cost_less_however_noisy_the_points(times: list[float]) -> None:
    values = iter(times)
    found = table(lambda n, k: next(values))
    surface = {(n, k): found.block_ms(n, k) for n in range(1, 21) for k in range(1, n + 1)}
    for (n, k), ms in surface.items():
        assert min(times) - 1e-9 <= ms <= max(times) + 1e-9
        for more in ((n + 1, k), (n, k + 1)):
            if more in surface:
                assert surface[more] >= ms - 1e-9


@given(noisy)
def test_the_surface_moves_no_point_further_than_it_must(times: list[float]) -> None:
    values = iter(times)
    found = table(lambda n, k: next(values))
    points = [(point.tokens_in, point.tokens_out, point.ms) for point in found.points]
    pairs = itertools.product(points, points)
    least = max((a[2] - b[2]) / 2 for a, b in pairs if a[0] <= b[0] and a[1] <= b[1])  # no monotone surface is closer than this
    assert max(abs(found.block_ms(n, k) - ms) for n, k, ms in points) == pytest.approx(max(least, 0), abs=1e-9)


def test_a_plan_costs_its_ends_and_its_blocks() -> None:
    found = table()
    counts = [20, 15, 7, 1]
    blocks = [(20, 20), (20, 15), (15, 7), (7, 1)]
    assert found.of(counts) == pytest.approx(2.0 + sum(found.block_ms(n, k) for n, k in blocks))
    assert found.dense() == pytest.approx(found.dense_ms)
    assert found.of([20] * 4) == found.dense()


def test_blocks_are_scaled_to_the_measured_whole() -> None:
    alone = table()
    found = table(dense_ms=2.0 + 0.5 * (alone.dense_ms - 2.0))  # together, blocks took half the time
    assert found.dense() == pytest.approx(found.dense_ms)
    assert found.of([12, 6, 3, 1]) - 2.0 == pytest.approx(0.5 * (alone.of([12, 6, 3, 1]) - 2.0))
    assert table(dense_ms=1.0).of([12, 6, 3, 1]) == alone.of([12, 6, 3, 1])  # nothing to scale by


def test_stale_blocks_read_every_token() -> None:
    points = [{"tokens_in": 20, "tokens_out": k, "ms": 1.0 + k} for k in (20, 12, 1)]
    found = table(mode="stale", points=points, dense_ms=2.0 + 4 * 21)
    assert found.of([20, 12, 12, 1]) == pytest.approx(2.0 + 21 + 13 + 13 + 2)
    assert found.block_ms(12, 12) == found.block_ms(20, 12) == 13.0


@pytest.mark.parametrize(("n", "k"), [(21, 1), (5, 6), (5, 0), (0, 0)])
def test_a_block_that_cannot_be_has_no_time(n: int, k: int) -> None:
    with pytest.raises(ValueError, match="cannot output"):
        table().block_ms(n, k)


@pytest.mark.parametrize("counts", [[20, 12, 6], [20, 12, 13, 1], [21, 12, 6, 1], [20, 12, 6, 0]])
def test_counts_that_no_plan_has_are_refused(counts: list[int]) -> None:
    geometry = Geometry.model_validate(GEOMETRY)
    costs: list[Cost] = [table(), MacsCost(20, 4, geometry)]
    for cost in costs:
        with pytest.raises(ValueError, match=r"token counts|cannot output"):
            cost.of(counts)


def test_macs_are_those_of_the_plan() -> None:
    geometry = Geometry.model_validate(GEOMETRY)
    for mode, layout in itertools.product(("compact", "stale"), ("split", "packed")):
        cost: Cost = MacsCost(20, 4, geometry, mode, layout)  # type: ignore[arg-type]
        assert cost.of([20, 12, 6, 1]) == macs_of([20, 12, 6, 1], 20, geometry, mode, layout)  # type: ignore[arg-type]
        assert cost.dense() == macs_of([20] * 4, 20, geometry)
    assert (cost.unit, table().unit) == ("MACs", "ms")


def test_a_saved_table_is_read_back(tmp_path: Path) -> None:
    found = table()
    found.dense()  # what it has worked out is not part of it
    found.save(tmp_path / "table.json")
    again = load_table(tmp_path / "table.json")
    assert again.model_dump() == found.model_dump()
    assert again.of([20, 12, 6, 1]) == found.of([20, 12, 6, 1])
    written = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    schema: Any = latency_table_schema()
    assert set(schema["required"]) <= set(written) <= set(schema["properties"])


def _without(n: int, k: int) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = fields()["points"]
    return [point for point in points if (point["tokens_in"], point["tokens_out"]) != (n, k)]


EXTRA = {"tokens_in": 20, "tokens_out": 7, "ms": 1.0}
BETWEEN = [EXTRA, {**EXTRA, "tokens_in": 12}]
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "another version": ({"schema_version": 2}, "schema_version"),
    "a field of its own": ({"comment": "hello"}, "comment"),
    "a time below zero": ({"points": [{**EXTRA, "ms": -1.0}]}, r"points\.0\.ms"),
    "no time at all": ({"dense_ms": float("nan")}, "dense_ms"),
    "endless": ({"fixed_ms": float("inf")}, "fixed_ms"),
    "no points": ({"points": []}, "points"),
    "a number as text": ({"batch": "8"}, "batch"),
    "a truth as a number": ({"depth": True}, "depth"),
    "another engine": ({"engine": "abacus"}, "engine"),
    "no full block": ({"points": _without(20, 20)}, "largest must be of the full block"),
    "a hole": ({"points": _without(12, 3)}, "hole at 12 tokens in, 3 out"),
    "a hole on the diagonal": ({"points": _without(6, 6)}, "hole at 6 tokens in, 6 out"),
    "a point twice": ({"points": [*fields()["points"], fields()["points"][0]]}, "twice"),
    "more out than in": ({"points": [*fields()["points"], {**EXTRA, "tokens_out": 21}]}, "cannot output 21 of 20"),
    "an output that nothing reads": ({"points": [*fields()["points"], *BETWEEN]}, "no block that reads 7"),
    "more tokens than the model has": ({"tokens": 12}, "largest must be"),
    "stale blocks that read less": ({"mode": "stale"}, "reads all 20 tokens"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_table_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    changes, fault = HOSTILE[kind]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(fields(**changes)), encoding="utf-8")
    with pytest.raises(InputRejected, match=rf"(?s)table\.json: not a valid latency table: .*{fault}"):
        load_table(path)


@pytest.mark.parametrize("data", [b"", b"[1, 2", b"\xff\xfe\x00", b"null"])
def test_a_file_that_is_no_table_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(data)
    with pytest.raises(InputRejected, match=r"table\.json: (not a valid|cannot be read as a) latency table"):
        load_table(path)
    with pytest.raises(InputRejected, match=r"missing\.json: is missing: it cannot be read as a latency table"):
        load_table(tmp_path / "missing.json")


@st.composite
def roundings(draw: st.DrawFn) -> tuple[list[int], int, int, int, Any]:
    prefix, tokens = draw(st.integers(0, 6)), draw(st.integers(7, 300))
    counts = sorted(draw(st.lists(st.integers(max(prefix, 1), tokens), min_size=1, max_size=12)), reverse=True)
    head = [draw(st.integers(1, prefix))] if prefix and draw(st.booleans()) else []
    return [*counts, *head], draw(st.integers(1, 40)), tokens, prefix, draw(st.sampled_from(["down", "up", "nearest"]))


@given(roundings())
def test_rounded_counts_are_multiples_and_still_a_plan(case: tuple[list[int], int, int, int, Any]) -> None:
    counts, multiple, tokens, prefix, rounding = case
    found = snap(counts, multiple, tokens, prefix, rounding)
    assert found == sorted(found, reverse=True)
    assert snap(found, multiple, tokens, prefix, rounding) == found
    for before, after in zip(counts, found, strict=True):
        assert after == before if before == tokens or before <= prefix else after % multiple == 0 or after == tokens
        assert min(before, max(prefix, 1)) <= after <= tokens
        assert abs(after - before) < multiple
        if rounding == "up":
            assert after >= before
        elif rounding == "down" and before - before % multiple >= max(prefix, 1):
            assert after <= before
        elif rounding == "nearest" and before - before % multiple >= max(prefix, 1) and after != tokens:
            assert 2 * abs(after - before) <= multiple


def test_rounding_by_example() -> None:
    counts = [197, 196, 160, 153, 121, 12, 3, 1, 1]
    assert snap(counts, 8, 197, 1, "down") == [197, 192, 160, 152, 120, 8, 8, 1, 1]
    assert snap(counts, 8, 197, 1, "up") == [197, 197, 160, 160, 128, 16, 8, 1, 1]
    assert snap(counts, 8, 197, 1) == [197, 197, 160, 152, 120, 16, 8, 1, 1]
    assert snap([197, 7, 1], 4, 197, 5) == [197, 8, 1]  # 4 has no room for five prefix tokens
    with pytest.raises(ValueError, match="multiples of 0"):
        snap(counts, 0, 197, 1)
    with pytest.raises(ValueError, match="from 1 to 197"):
        snap([198], 8, 197, 1)


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
        grid=[9, 13],
        rounds=2,
        progress=lambda *report: seen.append(report),
    )
    assert (found.model, found.tokens, found.depth, found.batch, found.threads) == ("tiny", plan.tokens, 4, 2, 1)
    assert (found.mode, found.layout, found.precision, found.engine, found.repeats) == (mode, layout, precision, "ort", 2)
    counts = sorted({plan.tokens, 13, 9, plan.prefix_tokens})
    reads = [plan.tokens] if mode == "stale" else counts
    wanted = {(n, k) for n in reads for k in {*counts, 1} if k <= n}
    assert {(point.tokens_in, point.tokens_out) for point in found.points} == wanted
    assert found.of([plan.tokens] * 4) == pytest.approx(found.dense_ms)
    assert found.of([13, 9, 9, 1]) <= found.dense()
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
