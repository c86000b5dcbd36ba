"""The picture of a plan fits its number of blocks, and says what merged and dropped patches look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.kept_patches import draw_kept_patches
from patchslim.macs import Geometry
from patchslim.plan import Origin, SlimPlan

GEOMETRY = Geometry(embed_dim=8, mlp_hidden_dim=16, patch_macs=100, head_macs=48)


def plan(depth: int, merged: bool) -> SlimPlan:
    """A plan of a 2 x 2 grid, the first block of which drops a patch, into another where ``merged``."""
    return SlimPlan(
        model="vit_tiny_patch16_224",
        tokens=5,
        grid=(2, 2),
        prefix_tokens=1,
        pooling="token",
        head_tokens=[0],
        mode="compact",
        kept=[[0, 1, 2, 3]] * depth,
        merged_into=[-1, -1, -1, -1, 3] if merged else None,
        geometry=GEOMETRY,
        origin=Origin(score="paper", criterion="manual", value=0.0),
    )


def drawn(plan: SlimPlan, path: Path) -> np.ndarray:
    draw_kept_patches(plan, "split", np.full((32, 32, 3), 0.5), path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(("depth", "columns", "rows"), [(1, 3, 1), (2, 3, 1), (7, 4, 2), (12, 6, 2), (13, 5, 3), (24, 6, 4)])
def test_the_canvas_fits_the_blocks(tmp_path: Path, depth: int, columns: int, rows: int) -> None:
    height, width = drawn(plan(depth, merged=False), tmp_path / "a.png").shape[:2]
    assert width == pytest.approx(2.1 * columns * 110, abs=2)
    assert height == pytest.approx((2.35 * rows + 0.85) * 110, abs=2)


@pytest.mark.parametrize(("depth", "rows"), [(1, 1), (12, 2), (24, 4)])
def test_no_title_touches_an_image(tmp_path: Path, depth: int, rows: int) -> None:
    drawn_lines = (drawn(plan(depth, merged=False), tmp_path / "a.png") < 255).any(axis=(1, 2))
    bands = int(drawn_lines[0]) + int((np.diff(drawn_lines.astype(int)) == 1).sum())
    heading_lines = 2 if depth == 1 else 1
    assert bands == heading_lines + 2 * rows + 1  # a title and an image a row, and the legend


@pytest.mark.parametrize("merged", [True, False])
def test_the_legend_names_what_is_shown(tmp_path: Path, merged: bool) -> None:
    pixels = drawn(plan(2 if merged else 1, merged=merged), tmp_path / "a.png")
    line = pixels[pixels.shape[0] - round(0.22 * 110)]  # through the middle of the swatches
    swatches = {tuple(pixel) for pixel in line.tolist() if pixel[0] == pixel[1] == pixel[2]} & {(127,) * 3, (15,) * 3}
    assert swatches == ({(127,) * 3} if merged else {(127,) * 3, (15,) * 3})


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        drawn(plan(3, merged=True), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
