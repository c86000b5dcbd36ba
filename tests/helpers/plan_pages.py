"""Pages of a small plan, read as a browser reads them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchslim.macs import Geometry
from patchslim.plan import Origin, SlimPlan
from slimming.report import page as page_module
from slimming.report.page import PlanPage, write_page
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


OWN = SweepPoint(0.5, PLAN.macs(), PLAN.counts, 96.75, 98.0, list(ERRORS), 400, (0.05, 1.45), (96.1, 99.0))


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
