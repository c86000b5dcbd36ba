"""What a plan's page draws: bars, curves and maps stand for their numbers, and stay inside their frames."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from patchslim.macs import macs_of
from slimming.report.page import block_macs
from slimming.report.points import SweepPoint
from tests.helpers.plan_pages import CSS, ERRORS, GEOMETRY, OWN, PLAN, SWEEP, full, picture, plan_of, table, write


def test_each_measure_has_an_axis_of_its_own_and_its_interval(tmp_path: Path) -> None:
    write(tmp_path / "page.html", errors=ERRORS, sweep=[*SWEEP, OWN], dense_top1=97.5)
    top1, agreement = re.findall(
        r"<svg class=\"chart\"[^>]*the sweep: .*?</svg>", (tmp_path / "page.html").read_text("utf-8"), re.DOTALL
    )
    ticks = [
        [float(each) for each in re.findall(r'<text class="end"[^>]*>([\d.]+)</text>', chart)] for chart in (top1, agreement)
    ]
    assert (min(ticks[0]) <= 91.5, max(ticks[0]) < 100) == (True, True)  # top-1 from 91.5 to 97.5
    assert (min(ticks[1]) <= 93.25, max(ticks[1]) == 100) == (True, True)  # agreement from 93.25 to 99.75
    assert "rect" not in top1
    assert "circle" not in agreement
    for chart, low, high in ((top1, 97.5 - 1.45, 97.5 - 0.05), (agreement, 96.1, 99.0)):
        lines = dict(re.findall(r'<line class="grid"[^>]*y1="([\d.]+)"[^>]*/>\s*<text class="end"[^>]*>([\d.]+)', chart))
        (top, first), (bottom, last) = sorted(((float(y), float(value)) for y, value in lines.items()))[:: len(lines) - 1]
        ((y1, y2),) = re.findall(r'<line class="span"[^>]*y1="([\d.]+)" y2="([\d.]+)"', chart)
        edges = [first + (float(y) - top) / (bottom - top) * (last - first) for y in (y1, y2)]
        assert sorted(edges) == pytest.approx([low, high], abs=0.02)


def test_the_curve_falls_where_accuracy_does(tmp_path: Path) -> None:
    full(tmp_path / "page.html")
    curve = (tmp_path / "page.html").read_text(encoding="utf-8").partition('<g class="top1">')[2]
    (x1, y1), (x2, y2) = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', curve)[:2]
    assert float(x1) < float(x2)  # more MACs removed: further right
    assert float(y1) < float(y2)  # less accurate: further down


def test_bars_stand_on_the_axis_and_are_as_high_as_their_numbers(tmp_path: Path) -> None:
    page = full(tmp_path / "page.html")
    high = {
        name: [float(had["height"] or 0) for had in page.having("rect", class_=name) if "x" in had]
        for name in ("slim", "dense")
    }
    tokens, cost = high["slim"][:3], high["slim"][3:]
    macs = block_macs(PLAN, "split")
    assert [bar / tokens[0] for bar in tokens] == pytest.approx([1, 7 / 12, 1 / 12], abs=1e-3)
    assert [bar / cost[0] for bar in cost] == pytest.approx([each / macs[0] for each in macs], abs=1e-3)
    assert high["dense"][0] / tokens[0] == pytest.approx(16 / 12, abs=1e-3)
    feet = {float(had["y"] or 0) + float(had["height"] or 0) for had in page.having("rect", class_="slim") if "x" in had}
    assert max(feet) - min(feet) < 0.02


def test_maps_show_the_kept_patches(tmp_path: Path) -> None:
    plan = plan_of([12, 7, 1], kept=[[0, 1, 5, 6, 15], [0, 6], [0]])
    page = write(tmp_path / "page.html", plan, images=[picture(48, 80)])
    dropped = [path["d"] or "" for path in page.having("path", class_="dropped")]
    corners = [{(int(x) // 16, int(y) // 16) for x, y in re.findall(r"M(\d+) (\d+)", area)} for area in dropped]
    everywhere = {(x, y) for x in range(5) for y in range(3)}
    assert corners == [everywhere - {(0, 0), (4, 0), (0, 1), (4, 2)}, everywhere - {(0, 1)}, everywhere]
    kept = Counter({0: 1, 4: 1, 5: 2, 14: 1})  # patches, that is tokens less the prefix token
    numbers = re.findall(r'<text class="number"[^>]*>(\d+)</text>', (tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [int(number) for number in numbers] == [kept[patch] for patch in range(15)]


def test_a_line_runs_only_between_kept_and_dropped(tmp_path: Path) -> None:
    page = write(tmp_path / "page.html", plan_of([16, 7], kept=[list(range(16)), [0, 1]]))
    whole, one = (path["d"] for path in page.having("path", class_="edge"))
    assert whole == ""
    assert one == "M16 0v16M0 16h16"


def test_patches_that_are_not_square_are_drawn_so(tmp_path: Path) -> None:
    page = write(tmp_path / "page.html", plan_of([4, 1], (2, 3)), images=[picture(20, 60)])
    assert page.having("svg", class_="map", viewbox="0 0 48 16")  # two rows of 10 pixels, three columns of 20


@pytest.mark.parametrize("dense_top1", [None, 50.0])
@pytest.mark.parametrize(("top1", "agreement"), [(None, None), (None, 90.0), (50.0, None), (100.0, 100.0), (0.0, 0.0)])
def test_a_sweep_of_one_point_and_missing_measures(
    top1: float | None, agreement: float | None, dense_top1: float | None, tmp_path: Path
) -> None:
    point = SweepPoint(0.0, 1000, [12, 7, 1], top1, agreement, [])
    page = write(tmp_path / "page.html", sweep=[point], dense_top1=dense_top1)
    assert ("Top-1 (%) against MACs removed" in page.words()) is (top1 is not None)
    assert ("Answers like the dense model's (%) against" in page.words()) is (agreement is not None)
    assert ("–" if top1 is None else f"{top1:.2f} %") == table(tmp_path / "page.html", "<h2>Measured")[0][2]


def test_the_marks_of_a_chart_stay_inside_it(tmp_path: Path) -> None:
    points = [SweepPoint(r / 10, 1, [1], 100 - r**2, 99.99 - r, [0.0]) for r in range(1, 10)]
    page = write(tmp_path / "page.html", errors=[4e-9, 0.7, 12.0], sweep=points, dense_top1=99.99)
    for tag, x, y in (("circle", "cx", "cy"), ("rect", "x", "y"), ("line", "x1", "y1"), ("line", "x2", "y2")):
        marks = [had for found, had in page.elements if found == tag and x in had and y in had]
        assert marks
        assert all(0 <= float(had[x] or 0) <= 520 and 0 <= float(had[y] or 0) <= 260 for had in marks)


@pytest.mark.parametrize("columns", [1, 3, 14, 40])
def test_outlines_crowd_neither_a_map_of_many_patches_nor_one_of_few(columns: int, tmp_path: Path) -> None:
    """They are in the map's own units, of which a patch is 16 wide, so that they shrink with it."""
    plan = plan_of([2, 1], (2, columns), kept=[[0, 1], [0]])
    page = write(tmp_path / "page.html", plan, images=[picture(2 * 16, columns * 16)])
    widths = {float(path["stroke-width"] or 0) for path in page.having("path", class_="edge")}
    assert len(widths) == 1
    assert 0 < min(widths) <= min(16 / 12, 16 * columns / 100)
    assert "non-scaling-stroke" not in CSS.read_text(encoding="utf-8")


def test_stale_blocks_read_every_token(tmp_path: Path) -> None:
    words = write(tmp_path / "page.html", plan_of([12, 7, 1], mode="stale")).words()
    assert [row[1] for row in table(tmp_path / "page.html", "Block by block")] == ["16"] * 3
    assert "later blocks still read its last value" in words


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_blocks_add_up_to_the_model(mode: Any, layout: Any) -> None:
    plan = plan_of([12, 12, 5, 1], mode=mode)
    fixed = GEOMETRY.patch_macs + GEOMETRY.head_macs
    assert sum(block_macs(plan, layout)) + fixed == plan.macs(layout)
    dense = block_macs(plan, layout, [16] * 4)
    assert len(set(dense)) == 1
    assert sum(dense) + fixed == plan.dense_macs() == macs_of([16] * 4, 16, GEOMETRY)


def test_the_pool_is_no_blocks_cost() -> None:
    pooled = PLAN.model_copy(update={"geometry": GEOMETRY.model_copy(update={"pool_macs": 1000, "pool_tokens": 9})})
    assert block_macs(pooled, "split") == block_macs(PLAN, "split")


@pytest.mark.parametrize(
    ("grid", "prefix", "counts"),
    [((1, 1), 1, [1]), ((1, 9), 1, [4, 1]), ((9, 1), 2, [5, 2]), ((32, 40), 5, [1285] * 30 + [5]), ((2, 2), 1, [5, 5])],
)
def test_odd_grids_and_depths(grid: tuple[int, int], prefix: int, counts: list[int], tmp_path: Path) -> None:
    plan = plan_of(counts, grid, prefix)
    errors = [0.0] * len(counts)
    words = write(tmp_path / "page.html", plan, errors=errors, images=[picture(grid[0] * 8, grid[1] * 16)]).words()
    assert f"{grid[0]} × {grid[1]} patches" in words
    assert "Every E is exactly zero" in words
    assert "The sweep" not in words
    assert not re.search(r"\b(nan|inf)\b", words)
