"""Latency tables: the surface between their points, a plan's sum, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchslim.errors import InputRejected
from patchslim.latency_table import LatencyTable, latency_table_schema, load_table
from patchslim.macs import Geometry, macs_of
from slimming.search.costs import Cost, MacsCost

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
