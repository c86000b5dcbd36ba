"""The page of a plan: whole, well formed, right in its numbers, the same bytes again, and harmless whatever the names are."""

from __future__ import annotations

import base64
import html
import io
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchslim.plan import Calibration, Origin
from slimming.report.page import block_macs
from slimming.report.points import SweepPoint
from tests.helpers.plan_pages import CSS, ERRORS, OWN, PLAN, SWEEP, full, picture, plan_of, table, write


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
