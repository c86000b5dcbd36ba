"""The page of a plan: what it keeps, what that costs and the errors it causes, as one HTML file that needs nothing else.

Every mark is inline SVG that the style sheet colours, so that the page is sharp at any size, follows light and dark, prints,
and is the same bytes for the same input. No JavaScript, no request: a content security policy inside the page forbids both.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchslim.choices import Layout
from patchslim.macs import block_macs_of
from patchslim.plan import SlimPlan
from patchslim.records import atomic_path
from slimming.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, bars, curve, error_plot
from slimming.report.points import SweepPoint, distinct_points

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    Picture = Image.Image | npt.NDArray[np.uint8]

#: Images shown, and the longest side at which they are embedded, pixels.
MOST_IMAGES, LONGEST_SIDE = 4, 448
CELL = 16  # width of a patch in the maps, SVG units
#: Up to this many patch columns have a number in each cell.
MOST_CELL_LABELS = 20
NARROW = "\N{NARROW NO-BREAK SPACE}"
TOP1 = "top\N{NON-BREAKING HYPHEN}1"
_VIRIDIS = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"]


@dataclass(frozen=True)
class PlanPage:
    """What the page of ``plan`` shows.

    ``layout`` is how the cuts are laid, for the MACs. ``errors[l]`` is E of the block above cut l (0 for the last). ``images``
    are as the model sees them, PIL or uint8 (h, w, 3); the first four are shown. ``dense_top1`` is in percent. ``facts`` are
    more rows of the table of facts, ``command`` is what made the plan.
    """

    plan: SlimPlan
    layout: Layout
    errors: Sequence[float]
    images: Sequence[Picture] = ()
    sweep: Sequence[SweepPoint] = ()
    dense_top1: float | None = None
    command: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


def write_page(path: Path, page: PlanPage) -> None:
    """Write ``page`` to ``path``, whole or not at all.

    Raises ``OSError``, and ``ValueError`` for errors that are not one per block or an array that is no image.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    plan, layout, errors = page.plan, page.layout, page.errors
    if len(errors) != plan.depth:
        raise ValueError(f"{len(errors)} errors for {plan.depth} blocks")
    # Autoescape is what makes names and addresses from outside harmless; nothing in the templates turns it off.
    folder = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    reduction = 1 - plan.macs(layout) / plan.dense_macs()
    rows = _rows(plan, layout, errors)
    unit, scale, decimals = _unit(plan.dense_macs())
    block_unit, block_scale, block_decimals = _unit(max(row["dense"] for row in rows))
    templates.filters.update(
        macs=lambda macs: f"{macs / scale:.{decimals}f}",
        block_macs=lambda macs: f"{macs / block_scale:.{block_decimals}f}",
        amount=_amount,
        small=lambda value: "0" if value == 0 else f"{value:.2e}",
        percent=lambda value: "–" if value is None else f"{value:.2f}{NARROW}%",
        share=lambda value: f"{value:.1%}".replace("%", f"{NARROW}%"),
        points=lambda value: f"{value:.2f}".replace("-", "\N{MINUS SIGN}"),
    )
    photos = [_photo(image) for image in page.images[:MOST_IMAGES]]
    points = distinct_points(page.sweep)
    own = next(
        (point for point in page.sweep if list(point.counts) == plan.counts and list(point.errors) == list(errors)), None
    )
    text = templates.get_template("page.html").render(
        plan=plan,
        layout=layout,
        unit=unit,
        block_unit=block_unit,
        reduction=reduction,
        dense_top1=page.dense_top1,
        own=own,
        headline=_headline(reduction, own, page.dense_top1),
        command=page.command,
        facts=dict(page.facts),
        photos=[url for url, _ in photos],
        maps=_maps(plan, photos[0][1] if photos else None),
        rows=rows,
        tokens=bars(plan.counts, [plan.tokens] * plan.depth),
        cost=bars(*([row[which] / block_scale for row in rows] for which in ("slim", "dense"))),
        head_macs=plan.macs(layout) - plan.geometry.patch_macs - sum(row["slim"] for row in rows),
        error=error_plot(errors, plan.origin.tolerance),
        sweep=points,
        curves={
            "top1": curve(points, "top1", reduction, page.dense_top1),
            "agreement": curve(points, "agreement", reduction),
        },
        walk=plan.origin.walk,
        walk_curve=walk_curve(plan, reduction),
        narrow=NARROW,
        top1=TOP1,
        size=(WIDTH, HEIGHT),
        box=(LEFT, TOP, RIGHT, BOTTOM),
    )
    with atomic_path(path) as part:
        # A command line may hold bytes that are no UTF-8 (lone surrogates in Python): shown as such rather than a failure.
        part.write_bytes(text.encode("utf-8", "backslashreplace"))


def walk_curve(plan: SlimPlan, reduction: float) -> dict[str, Any] | None:
    """Geometry of what was tried on the way to the largest reduction; None where none was looked for."""
    walk = plan.origin.walk
    if walk is None or not walk.points:
        return None
    points = [
        SweepPoint(
            reduction=1 - point.macs / plan.dense_macs(),
            macs=point.macs,
            counts=[],
            top1=point.top1,
            agreement=point.agreement,
            errors=[],
            images=walk.images,
            drop_interval=point.interval if walk.dense_top1 is not None else None,
            agreement_interval=None if walk.dense_top1 is not None else (100 - point.interval[1], 100 - point.interval[0]),
        )
        for point in walk.points
    ]
    return curve(distinct_points(points), "agreement" if walk.dense_top1 is None else "top1", reduction, walk.dense_top1)


def block_macs(plan: SlimPlan, layout: Layout, counts: Sequence[int] | None = None) -> list[int]:
    """Return the MACs of every block for one image, under the plan's token counts or others; without patches and head."""
    return block_macs_of(list(counts or plan.counts), plan.tokens, plan.geometry, plan.mode, layout, plan.merging)


def _headline(reduction: float, own: SweepPoint | None, dense_top1: float | None) -> str:
    """What the plan saves and what it costs, in one line; the plan's own point is ``own``, where it was measured."""
    saved = f"{reduction:.1%} of the MACs removed".replace("%", f"{NARROW}%")
    if reduction <= 0:
        return "Nothing is removed: every block keeps every token"
    if own is not None and own.top1 is not None and dense_top1 is not None:
        lost = dense_top1 - own.top1
        if abs(lost) < 0.005:
            return f"{saved}, {TOP1} unchanged"
        return f"{saved}, {TOP1} {abs(lost):.2f} points {'lower' if lost > 0 else 'higher'}"
    if own is not None and own.agreement is not None:
        return f"{saved}, {own.agreement:.2f}{NARROW}% of the answers unchanged"
    return f"{saved}; what that costs was not measured"


def _unit(most: int) -> tuple[str, float, int]:
    """One unit for MAC counts of up to ``most``, so that a column compares: its name, how many MACs it is, and decimals."""
    for name, size in (("GMACs", 1e9), ("MMACs", 1e6), ("kMACs", 1e3)):
        if most >= size:
            return name, size, 3 - min(2, int(math.log10(most / size)))
    return "MACs", 1.0, 0


def _amount(macs: int) -> str:
    name, size, decimals = _unit(macs)
    return f"{macs / size:.{decimals}f} {name}"


def _rows(plan: SlimPlan, layout: Layout, errors: Sequence[float]) -> list[dict[str, Any]]:
    read = [plan.tokens, *plan.counts[:-1]] if plan.mode == "compact" else [plan.tokens] * plan.depth
    dense = block_macs(plan, layout, [plan.tokens] * plan.depth)
    cells = zip(read, plan.counts, dense, block_macs(plan, layout), errors, strict=True)
    return [dict(zip(("tokens_in", "tokens_out", "dense", "slim", "error"), row, strict=True)) for row in cells]


def _photo(image: Picture) -> tuple[str, tuple[int, int]]:
    """An image as a data URL, and its width and height in pixels. Raises ``ValueError`` for an array that is no image."""
    import numpy as np
    from PIL import Image

    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
            raise ValueError(f"an image must be uint8 (h, w, 3), not {array.dtype} {array.shape}")
        image = Image.fromarray(array)
    shrink = min(1.0, LONGEST_SIDE / max(image.size))
    small = (max(1, round(image.width * shrink)), max(1, round(image.height * shrink)))
    buffer = io.BytesIO()
    image.convert("RGB").resize(small, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), image.size


def _maps(plan: SlimPlan, pixels: tuple[int, int] | None) -> dict[str, Any]:
    """Kept patches of every block as SVG paths, and how many blocks keep each patch by itself, in the patches' shape."""
    rows, columns = plan.grid
    high = CELL if pixels is None else max(1, round(CELL * (pixels[1] / rows) / (pixels[0] / columns)))
    first = plan.prefix_tokens
    groups = [[into - first if into >= first else -1 for into in stands[first:]] for stands in plan.stands_for()]
    alone = [{patch for patch, into in enumerate(each) if into >= 0 and each.count(into) == 1} for each in groups]
    depths = Counter(patch for patches in alone for patch in patches)
    masks = [_mask_paths(each, single, columns, high) for each, single in zip(groups, alone, strict=True)]
    cells = []
    for patch in range(rows * columns):
        y, x = divmod(patch, columns)
        fill, ink = _colour(depths[patch], plan.depth)
        cells.append({"row": y, "column": x, "n": depths[patch], "fill": fill, "ink": ink})
    return {
        "cell": (CELL, high),
        # In the map's units, so that both take the same share of it at every size: at most a twelfth of a patch, so that
        # outlines do not crowd a small picture of many, and of the whole map as much as suits one of few.
        "stroke": min(1.3, round(0.13 * columns, 2)),
        "letter": min(7.0, round(0.9 * columns, 2)),
        "size": (columns * CELL, rows * high),
        "patches": rows * columns,
        "blocks": [{"kept": len({*each} - {-1}), **mask} for each, mask in zip(groups, masks, strict=True)],
        "cells": cells,
        "numbered": columns <= MOST_CELL_LABELS and plan.depth < 100,
        "legend": [(n, _colour(n, plan.depth)[0]) for n in range(plan.depth + 1)],
        "every": math.ceil((plan.depth + 1) / 13),
    }


def _mask_paths(groups: Sequence[int], alone: set[int], columns: int, high: int) -> dict[str, str]:
    """SVG paths of one block's mask: the area of dropped patches, and the lines around them and around merged groups.

    ``groups`` name the patch that stands for each one, -1 for none; those ``alone`` stand for themselves and no other.
    """
    area, line = [], []
    for patch, group in enumerate(groups):
        y, x = divmod(patch, columns)
        if group < 0:
            area.append(f"M{x * CELL} {y * high}h{CELL}v{high}h-{CELL}z")
        for beside, there, edge in ((patch - 1, x, f"v{high}"), (patch - columns, y, f"h{CELL}")):
            if there and groups[beside] != group and not {patch, beside} <= alone:
                line.append(f"M{x * CELL} {y * high}{edge}")
    return {"area": "".join(area), "line": "".join(line)}


def _colour(count: int, most: int) -> tuple[str, str]:
    """The viridis colour of ``count`` out of ``most``, and the ink that is legible on it."""
    place = count / most * (len(_VIRIDIS) - 1)
    low = min(int(place), len(_VIRIDIS) - 2)
    pairs = ((int(_VIRIDIS[low][at : at + 2], 16), int(_VIRIDIS[low + 1][at : at + 2], 16)) for at in (0, 2, 4))
    mixed = "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in pairs)
    return f"#{mixed}", "#000" if place >= 4.5 else "#fff"
