"""The picture of a plan: which patches each block keeps, over a sample image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from patchslim.choices import Layout
from patchslim.plan import SlimPlan


def draw_kept_patches(plan: SlimPlan, layout: Layout, image: npt.NDArray[Any], path: Path) -> None:
    """Write a PNG with one panel per block: kept patches bright, dropped ones dark, merged ones in their mean colour.

    ``layout`` is how the cuts are laid, for the MACs in the title; ``image`` is (h, w, 3) in [0, 1], as the model sees it
    before normalisation. The same input gives the same bytes.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    columns = min(6, plan.depth)
    rows = math.ceil(plan.depth / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.1 * columns, 2.35 * rows + 0.4), squeeze=False)
    height, width = image.shape[:2]
    stands, sizes = plan.stands_for(), plan.sizes()
    for index, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if index >= plan.depth:
            continue
        where = np.arange(height) * plan.grid[0] // height, np.arange(width) * plan.grid[1] // width
        groups = np.array(stands[index][plan.prefix_tokens :]).reshape(plan.grid)[where[0]][:, where[1]]
        merged = [token for token, size in zip(plan.kept[index], sizes[index], strict=True) if size > 1]
        axis.imshow(np.clip(_mosaic(image, groups, merged), 0, 1), interpolation="nearest")
        axis.set_title(f"block {index + 1}: {plan.counts[index]} of {plan.tokens}", fontsize=8)
    saved = 1 - plan.macs(layout) / plan.dense_macs()
    figure.suptitle(f"{plan.model}: tokens kept after each block ({plan.mode}, {saved:.1%} of MACs removed)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _mosaic(image: npt.NDArray[Any], groups: npt.NDArray[Any], merged: list[int]) -> npt.NDArray[Any]:
    """``image`` (h, w, 3) with the ``merged`` of its groups (h, w) in their mean colour, and what is in none (-1) dark."""
    shown = image.copy()
    for group in merged:
        shown[groups == group] = image[groups == group].mean(axis=0)
    shown[groups < 0] *= 0.12
    return shown
