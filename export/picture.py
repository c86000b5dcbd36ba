"""The picture of a plan: which patches each block keeps, over a sample image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slimming.plan import Layout, SlimPlan


def draw_kept_patches(plan: SlimPlan, layout: Layout, image: npt.NDArray[Any], path: Path) -> None:
    """Write a PNG with one panel per block: kept patches bright, dropped ones dark.

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
    for index, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if index >= plan.depth:
            continue
        mask = np.zeros(plan.grid[0] * plan.grid[1], dtype=np.float32)
        patches = [token - plan.prefix_tokens for token in plan.kept[index] if token >= plan.prefix_tokens]
        mask[patches] = 1
        where = np.arange(height) * plan.grid[0] // height, np.arange(width) * plan.grid[1] // width
        kept = mask.reshape(plan.grid)[where[0]][:, where[1]][..., None]
        axis.imshow(np.clip(image * (0.12 + 0.88 * kept), 0, 1), interpolation="nearest")
        axis.set_title(f"block {index + 1}: {plan.counts[index]} of {plan.tokens}", fontsize=8)
    saved = 1 - plan.macs(layout) / plan.dense_macs()
    figure.suptitle(f"{plan.model}: tokens kept after each block ({plan.mode}, {saved:.1%} of MACs removed)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
