"""The page of a plan: whole, well formed, right in its numbers, the same bytes again, and harmless whatever the names are."""

from __future__ import annotations

import base64
import html
import io
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchslim.macs import Geometry, macs_of
from patchslim.plan import Calibration, Origin, SlimPlan
from slimming.report import page as page_module
from slimming.report.page import PlanPage, block_macs, write_page
from slimming.report.points import SweepPoint

CSS = Path(page_module.__file__).with_name("page.css")
VOID = {"meta", "br"}  # the void elements that the page uses
GEOMETRY = Geometry(embed_dim=192, mlp_hidden_dim=768, patch_macs=28_901_376, head_macs=192_000)


def plan_of(counts: list[int], grid: tuple[int, int] = (3, 5), prefix: int = 1, **more: Any) -> SlimPlan:
    """A plan that keeps the first ``counts`` tokens of each block."""
    fields: dict[str, Any] = {
        "model": "vit_tiny_patch16_224",
        "tokens": prefix + grid[0] * grid[1],
        "grid": grid,
        "prefix_tokens": prefix,
        "pooling": "token",
        "head_tokens": [0],
        "mode": "compact",
        "kept": [list(range(count)) for count in counts],
        "geometry": GEOMETRY,
        "origin": Origin(score="paper", criterion="macs-reduction", value=0.45, tolerance=2e-4),
    }
    return SlimPlan(**(fields | more))


PLAN = plan_of([12, 7, 1])
ERRORS = [3.25e-5, 1.5e-4, 0.0]
SWEEP = [
    SweepPoint(0.6, 20_000_000, [7, 4, 1], 91.5, 93.25, [1e-3, 2e-3, 0.0]),
    SweepPoint(0.2, 40_000_000, [14, 9, 1], 97.25, 99.75, [1e-5, 4.5e-6, 0.0]),
]


class Page(HTMLParser):
    """Checks that every element is closed in order; collects elements with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def having(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        named = {name.rstrip("_"): value for name, value in attributes.items()}
        return [had for found, had in self.elements if found == tag and named.items() <= had.items()]

    def words(self) -> str:
        return re.sub(r"\s+", " ", self.text).replace("\N{NON-BREAKING HYPHEN}", "-")  # narrow spaces too


def write(path: Path, plan: SlimPlan = PLAN, **more: Any) -> Page:
    write_page(path, PlanPage(**({"plan": plan, "layout": "split", "errors": [0.0] * plan.depth} | more)))
    return Page(path.read_text(encoding="utf-8"))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def full(path: Path) -> Page:
    images = [picture(48, 80), np.asarray(picture(48, 80, 1))]
    more = {"dense_top1": 97.5, "command": "python -m slimming.run -o x.json", "facts": {"held-out": "2,000 images"}}
    return write(path, errors=ERRORS, images=images, sweep=SWEEP, **more)


def table(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table body after ``heading``."""
    body = page.read_text(encoding="utf-8").partition(heading)[2].partition("<tbody>")[2].partition("</tbody>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>")]
    return [[re.sub(r"\s", " ", cell) for cell in row] for row in rows if row]


def test_the_page_says_what_the_plan_does(tmp_path: Path) -> None:
    words = full(tmp_path / "page.html").words()
    removed = 1 - PLAN.macs() / PLAN.dense_macs()
    for said in (
        "vit_tiny_patch16_224",
        f"{removed:.1%}".replace("%", " %"),
        f"{PLAN.dense_macs() / 1e6:.2f} → {PLAN.macs() / 1e6:.2f} MMACs",
        "16 → 1",
        "16 = 1 prefix + 3 × 5 patches",
        "1 prefix token, which is not a patch",
        "97.50 %",
        "2,000 images",
        "python -m slimming.run -o x.json",
        "tolerance 2.00e-04",
        "Exactly zero, so not drawn: block 3.",
    ):
        assert said in words, said


def test_every_block_has_its_row(tmp_path: Path) -> None:
    full(tmp_path / "page.html")
    rows = table(tmp_path / "page.html", "Block by block")
    assert [row[:3] for row in rows] == [["1", "16", "12"], ["2", "12", "7"], ["3", "7", "1"]]
    assert [row[6] for row in rows] == ["3.25e-05", "1.50e-04", "0"]
    assert [float(row[4]) for row in rows] == pytest.approx([macs / 1e6 for macs in block_macs(PLAN, "split")], abs=1e-3)


def test_the_sweep_is_in_order_with_its_change_against_dense_and_equal_plans_once(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    full(path)
    rows = [
        ["20.0 %", "40.00", "97.25 %", "−0.25", "–", "99.75 %", "1.00e-05", "14 9 1"],
        ["60.0 %", "20.00", "91.50 %", "−6.00", "–", "93.25 %", "2.00e-03", "7 4 1"],
    ]
    assert table(path, "The sweep") == rows
    write(path, errors=ERRORS, sweep=[*SWEEP, *SWEEP[::-1]], dense_top1=97.5)
    assert table(path, "The sweep") == rows


OWN = SweepPoint(0.5, PLAN.macs(), PLAN.counts, 96.75, 98.0, list(ERRORS), 400, (0.05, 1.45), (96.1, 99.0))
REMOVED = f"{1 - PLAN.macs() / PLAN.dense_macs():.1%}".replace("%", " %") + " of the MACs removed"


@pytest.mark.parametrize(
    ("own", "dense_top1", "headline", "said"),
    [
        (
            OWN,
            97.5,
            "top-1 0.75 points lower",
            "Top-1 97.50 % → 96.75 % on 400 held-out images; 95 % interval of the loss 0.05 to 1.45 p",
        ),
        (
            replace(OWN, drop_interval=(-0.1, 1.6)),
            97.5,
            "0.75 points lower",
            "−0.10 to 1.60 points, which these images cannot tell from none.",
        ),
        (OWN, 96.5, "top-1 0.25 points higher", "Top-1 96.50 % → 96.75 %"),
        (OWN, 96.75, "top-1 unchanged", "on 400 held-out images"),
        (
            replace(OWN, top1=None),
            None,
            "98.00 % of the answers unchanged",
            "95 % interval 96.10 % to 99.00 %. They have no labels",
        ),
        (None, 97.5, "; what that costs was not measured", "Before slimming top-1 is 97.50 %. Measure it"),
        (None, None, "; what that costs was not measured", "--eval-images 1000"),
    ],
)
def test_the_headline_says_what_was_saved_and_what_it_cost(
    own: SweepPoint | None, dense_top1: float | None, headline: str, said: str, tmp_path: Path
) -> None:
    page = write(tmp_path / "page.html", errors=ERRORS, sweep=[*SWEEP, *([own] if own else [])], dense_top1=dense_top1)
    (heading,) = re.findall(r"<h1>(.*?)</h1>", (tmp_path / "page.html").read_text(encoding="utf-8"))
    assert re.sub(r"\s", " ", heading).replace("\N{NON-BREAKING HYPHEN}", "-").startswith(REMOVED)
    assert headline in page.words()
    assert said in page.words()


def test_a_plan_that_drops_nothing_says_so(tmp_path: Path) -> None:
    assert "Nothing is removed" in write(tmp_path / "page.html", plan_of([16, 16, 16])).words()


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


def test_stale_blocks_read_every_token(tmp_path: Path) -> None:
    words = write(tmp_path / "page.html", plan_of([12, 7, 1], mode="stale")).words()
    assert [row[1] for row in table(tmp_path / "page.html", "Block by block")] == ["16"] * 3
    assert "later blocks still read its last value" in words


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


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_up_to_four_images_are_embedded_once_each(count: int, tmp_path: Path) -> None:
    images = [picture(48, 80, seed) for seed in range(count)]
    page = write(tmp_path / "page.html", images=images)
    shown = [image["href"] or "" for image in page.having("image")]
    assert len(shown) == len(set(shown)) == min(count, 4)
    labels = [had["aria-label"] or "" for had in page.having("svg", role="img") if "keeps" in (had["aria-label"] or "")]
    assert len(labels) == 3 * max(1, min(count, 4))
    for image, url in zip(images, shown, strict=False):
        decoded = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
        assert decoded.size == image.size


def test_a_large_image_is_made_smaller(tmp_path: Path) -> None:
    page = write(tmp_path / "page.html", images=[Image.new("L", (1500, 900))])
    url = page.having("image")[0]["href"] or ""
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (448, 269)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    full(tmp_path / "a.html")
    full(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


def test_hostile_names_are_text(tmp_path: Path) -> None:
    calibration = Calibration(data=HOSTILE, images=3, fingerprint=HOSTILE)
    origin = Origin(score=HOSTILE, criterion="manual", value=0.0, calibration=calibration)
    plan = plan_of([12, 7, 1], model=HOSTILE, origin=origin)
    page = write(tmp_path / "page.html", plan, command=HOSTILE, facts={HOSTILE: HOSTILE})
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [had for _, had in page.elements if any(name.startswith("on") for name in had)]
    assert (
        page.text.count(HOSTILE) == 9
    )  # title, name above the heading; model, score, data, fingerprint; both sides of a fact; command


def test_a_command_that_is_no_utf_8_is_shown(tmp_path: Path) -> None:
    assert r"--output \udcff.html" in write(tmp_path / "page.html", command="--output \udcff.html").text


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    page = full(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|\ssrc=|<link|<script", text)
    links = [value or "" for _, had in page.elements for name, value in had.items() if name in ("href", "xlink:href", "src")]
    assert all(value.startswith(("#", "data:image/jpeg;base64,")) for value in links)
    names = {had["id"] for _, had in page.elements if "id" in had}
    assert {value[1:] for value in links if value.startswith("#")} <= names
    policy = page.having("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in (policy[0]["content"] or "")


def test_every_picture_has_a_name(tmp_path: Path) -> None:
    pictures = [had for tag, had in full(tmp_path / "page.html").elements if tag == "svg"]
    assert pictures
    assert all(had.get("aria-hidden") == "true" or (had.get("role") == "img" and had.get("aria-label")) for had in pictures)


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


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(ValueError, match="2 errors for 3 blocks"):
        write(path, errors=[0.0, 0.0])
    with pytest.raises(ValueError, match="must be uint8"):
        write(path, images=[np.zeros((8, 8, 3), dtype=np.float32)])

    def no_room(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_room)
    with pytest.raises(OSError, match="No space"):
        write(path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("columns", [1, 3, 14, 40])
def test_outlines_crowd_neither_a_map_of_many_patches_nor_one_of_few(columns: int, tmp_path: Path) -> None:
    """They are in the map's own units, of which a patch is 16 wide, so that they shrink with it."""
    plan = plan_of([2, 1], (2, columns), kept=[[0, 1], [0]])
    page = write(tmp_path / "page.html", plan, images=[picture(2 * 16, columns * 16)])
    widths = {float(path["stroke-width"] or 0) for path in page.having("path", class_="edge")}
    assert len(widths) == 1
    assert 0 < min(widths) <= min(16 / 12, 16 * columns / 100)
    assert "non-scaling-stroke" not in CSS.read_text(encoding="utf-8")


def test_tables_scroll_by_themselves(tmp_path: Path) -> None:
    full(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert (
        text.count("<table")
        == len(re.findall(r'<div class="scroll" role="region" aria-label="[^"]+" tabindex="0"><table', text))
        == 3
    )
    assert re.search(r"\.scroll \{\s*overflow-x: auto;", CSS.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="lays the page out in Chromium")
@pytest.mark.parametrize("width", [320, 375, 1200])
def test_nothing_is_wider_than_a_screen(width: int, tmp_path: Path) -> None:
    """The page in a frame of that width: it need not be scrolled sideways, and its charts' text is legible."""
    counts = [180, 170, 160, 150, 140, 130, 120, 110, 100, 90, 80, 1]
    plan = plan_of(counts, (14, 14), model="vit_" + "x" * 60, kept=[list(range(count)) for count in counts])
    errors = [1e-3] * 11 + [0.0]
    own = replace(OWN, counts=counts, errors=errors)
    images = [picture(32, 32, seed) for seed in range(4)]
    facts = {"weights": "/a/" + "long" * 30}
    write(tmp_path / "page.html", plan, errors=errors, images=images, sweep=[*SWEEP, own], dense_top1=97.5, facts=facts)
    page = html.escape((tmp_path / "page.html").read_text(encoding="utf-8"), quote=True)
    look = """
        const page = document.querySelector("iframe").contentDocument;
        const texts = [...page.querySelectorAll(".chart text")].filter(text => text.getClientRects().length);
        const sizes = texts.map(text => text.getBoundingClientRect().height);
        document.title = [page.documentElement.scrollWidth, Math.min(...sizes), texts.length].join(" ");"""
    frame = f"<iframe style='border:0;width:{width}px;height:900px' srcdoc=\"{page}\" onload='{look}'></iframe>"
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><title></title>{frame}", encoding="utf-8")
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>([\d.]+) ([\d.]+) (\d+)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    assert float(found[1]) <= width
    assert float(found[2]) >= 9  # CSS pixels, the height of a line
    assert int(found[3]) > 40
