"""Draws a plan: which patches each block keeps, merges and drops, over a sample image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from patchslim.choices import Layout
from patchslim.plan import SlimPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Inches of a panel with its title above the image, of the image's longer side; of the heading, of the legend; and the least
#: width that both of these fit into.
_PANEL, _SIDE, _HEADING, _LEGEND, _LEAST_WIDTH = (2.1, 2.35), 1.95, 0.45, 0.4, 6.3
_MOST_COLUMNS = 6
_DIMMED = 0.12  # of the brightness of a patch that is dropped


def draw_kept_patches(plan: SlimPlan, layout: Layout, image: npt.NDArray[Any], path: Path) -> None:
    """Write a PNG of one panel a block: kept patches bright, dropped ones dark, merged ones in the mean colour of their group.

    ``layout`` decides the MACs in the heading; ``image`` is (h, w, 3) in [0, 1], as the model sees it before normalisation. The
    same input gives the same bytes. Raises ``OSError`` where ``path`` cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = math.ceil(plan.depth / _MOST_COLUMNS)
    columns = math.ceil(plan.depth / rows)  # no row is much emptier than the others
    width, height = max(_LEAST_WIDTH, _PANEL[0] * columns), _PANEL[1] * rows + _HEADING + _LEGEND
    figure = pyplot.figure(figsize=(width, height))
    stands, sizes = plan.stands_for(), plan.sizes()
    pixels = [np.arange(length) * count // length for length, count in zip(image.shape[:2], plan.grid, strict=True)]
    for index in range(plan.depth):
        row, column = divmod(index, columns)
        left, bottom = (column + 0.5) * width / columns - _SIDE / 2, _LEGEND + 0.1 + (rows - 1 - row) * _PANEL[1]
        axis = figure.add_axes((left / width, bottom / height, _SIDE / width, _SIDE / height))
        axis.set_axis_off()
        groups = np.array(stands[index][plan.prefix_tokens :]).reshape(plan.grid)[pixels[0]][:, pixels[1]]
        merged = [token for token, size in zip(plan.kept[index], sizes[index], strict=True) if size > 1]
        axis.imshow(np.clip(_mosaic(image, groups, merged), 0, 1), interpolation="nearest")
        axis.set_title(f"block {index + 1}: {plan.counts[index]} of {plan.tokens}", fontsize=8)
    saved = 1 - plan.macs(layout) / plan.dense_macs()
    heading = [f"{plan.model}: tokens kept after each block", f"({plan.mode}, {saved:.1%} of MACs removed)"]
    figure.text(0.5, 1 - 0.08 / height, (" " if width >= 8 else "\n").join(heading), fontsize=10, ha="center", va="top")
    _draw_legend(figure, image, _legend(plan))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _legend(plan: SlimPlan) -> list[tuple[str, str]]:
    """The swatches that explain the panels of ``plan``, each with its words."""
    shown = [("kept", "kept")]
    if plan.merging:
        shown.append(("merged", "merged: one token a group, in its mean colour"))
    if any(token < 0 for stands in plan.stands_for() for token in stands):
        shown.append(("dropped", "dropped"))
    return shown


def _draw_legend(figure: Figure, image: npt.NDArray[Any], shown: list[tuple[str, str]]) -> None:
    """Draw each swatch, made of the middle of ``image``, and its words, from left to right along the lower edge."""
    width, height = figure.get_size_inches()
    rows, columns = (slice(length * 3 // 8, max(length * 5 // 8, 1)) for length in image.shape[:2])
    middle = np.clip(image[rows, columns], 0, 1)
    swatches = {"kept": middle, "merged": np.broadcast_to(middle.mean(axis=(0, 1)), middle.shape), "dropped": middle * _DIMMED}
    side, left = _LEGEND * 0.6, 0.2
    for name, words in shown:
        axis = figure.add_axes((left / width, _LEGEND * 0.25 / height, side / width, side / height))
        axis.set_axis_off()
        axis.imshow(swatches[name], interpolation="nearest", aspect="auto")
        figure.text((left + side + 0.08) / width, _LEGEND * 0.55 / height, words, fontsize=8, va="center")
        left += side + 0.4 + 0.055 * len(words)  # inches of a character at this size


def _mosaic(image: npt.NDArray[Any], groups: npt.NDArray[Any], merged: list[int]) -> npt.NDArray[Any]:
    """``image`` (h, w, 3) with each group of ``merged`` in its mean colour, and dropped pixels dark.

    ``groups`` (h, w) has the group of each pixel, -1 where it was dropped.
    """
    shown = image.copy()
    for group in merged:
        shown[groups == group] = image[groups == group].mean(axis=0)
    shown[groups < 0] *= _DIMMED
    return shown
