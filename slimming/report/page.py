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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchslim.choices import Layout
from patchslim.macs import block_macs_of
from patchslim.plan import SlimPlan
from patchslim.records import atomic_path

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    Picture = Image.Image | npt.NDArray[np.uint8]

#: Images shown, and the longest side at which they are embedded, pixels.
MOST_IMAGES, LONGEST_SIDE = 4, 448
#: Chart area in SVG units, which are CSS pixels at full size: whole width and height, then the axes' box.
WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 508, 20, 220
CELL = 16  # width of a patch in the maps, SVG units
#: Up to this many blocks have a number on each bar, and up to this many patch columns one in each cell.
MOST_BAR_LABELS, MOST_CELL_LABELS = 16, 20
NARROW = "\N{NARROW NO-BREAK SPACE}"
_VIRIDIS = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"]


@dataclass(frozen=True)
class SweepPoint:
    """One plan of a sweep over budgets, and how it answers."""

    reduction: float  # fraction of the dense MACs removed
    macs: int
    counts: list[int]  # tokens out of each block
    top1: float | None  # percent on held-out images; None where there are no labels
    agreement: float | None  # percent of the images that the slim model answers like the dense one
    errors: list[float]  # E of the block above each cut


def write_page(
    path: Path,
    *,
    plan: SlimPlan,
    layout: Layout,
    errors: Sequence[float],
    images: Sequence[Picture] = (),
    sweep: Sequence[SweepPoint] = (),
    dense_top1: float | None = None,
    command: str = "",
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write the page of ``plan`` to ``path``, whole or not at all.

    ``layout`` is how the cuts are laid, for the MACs. ``errors[l]`` is E of the block above cut l (0 for the last). ``images``
    are as the model sees them, PIL or uint8 (h, w, 3); the first four are shown. ``dense_top1`` is in percent. ``facts`` are
    more rows of the table of facts, ``command`` is what made the plan. Raises ``OSError``, and ``ValueError`` for errors that
    are not one per block or an array that is no image.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

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
    )
    photos = [_photo(image) for image in images[:MOST_IMAGES]]
    points = sorted(sweep, key=lambda point: point.reduction)
    text = templates.get_template("page.html").render(
        plan=plan,
        layout=layout,
        unit=unit,
        block_unit=block_unit,
        reduction=reduction,
        dense_top1=dense_top1,
        slim_top1=next((p.top1 for p in points if list(p.counts) == plan.counts and list(p.errors) == list(errors)), None),
        command=command,
        facts=dict(facts or {}),
        photos=[url for url, _ in photos],
        maps=_maps(plan, photos[0][1] if photos else None),
        rows=rows,
        tokens=_bars(plan.counts, [plan.tokens] * plan.depth),
        cost=_bars(*([row[which] / block_scale for row in rows] for which in ("slim", "dense"))),
        head_macs=plan.macs(layout) - plan.geometry.patch_macs - sum(row["slim"] for row in rows),
        error=_error_plot(errors, plan.origin.tolerance),
        sweep=points,
        curve=_curve(points, dense_top1, reduction),
        size=(WIDTH, HEIGHT),
        box=(LEFT, TOP, RIGHT, BOTTOM),
    )
    with atomic_path(path) as part:
        # A command line may hold bytes that are no UTF-8 (lone surrogates in Python): shown as such rather than a failure.
        part.write_bytes(text.encode("utf-8", "backslashreplace"))


def block_macs(plan: SlimPlan, layout: Layout, counts: Sequence[int] | None = None) -> list[int]:
    """Return the MACs of every block for one image, under the plan's token counts or others; without patches and head."""
    return block_macs_of(list(counts or plan.counts), plan.tokens, plan.geometry, plan.mode, layout, plan.merging)


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


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers at even steps that enclose ``low`` to ``high``; about ``wanted`` of them."""
    span = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor * wanted >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, max(last, first + 1) + 1)]


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    return round(start + (value - low) / (high - low) * (end - start), 2)


def _columns(depth: int) -> tuple[list[float], float, list[tuple[float, int]]]:
    """Centres of the blocks' columns, their width, and the blocks that are named on the axis."""
    pitch = (RIGHT - LEFT) / depth
    centres = [round(LEFT + pitch * (index + 0.5), 2) for index in range(depth)]
    every = math.ceil(depth / MOST_BAR_LABELS)
    return centres, pitch, [(centres[index], index + 1) for index in range(0, depth, every)]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bars(slim: Sequence[float], dense: Sequence[float]) -> dict[str, Any]:
    """Geometry of a bar chart: dense bars behind slim ones, one column per block."""
    ticks = _ticks(0, max(dense))
    centres, pitch, names = _columns(len(slim))
    width = round(min(pitch * 0.76, 64), 2)

    def bar(value: float) -> tuple[float, float]:
        top = _place(value, 0, ticks[-1], BOTTOM, TOP)
        return top, round(BOTTOM - top, 2)

    bars = [
        {
            "x": round(x - width / 2, 2),
            "centre": x,
            "slim": bar(a),
            "dense": bar(b),
            "label": _short(a),
            "full": f"{_short(a)} of {_short(b)}",
        }
        for x, a, b in zip(centres, slim, dense, strict=True)
    ]
    return {
        "bars": bars,
        "width": width,
        "labelled": len(slim) <= MOST_BAR_LABELS,
        "names": names,
        "ticks": [(_place(tick, 0, ticks[-1], BOTTOM, TOP), f"{tick:g}") for tick in ticks],
    }


def _error_plot(errors: Sequence[float], tolerance: float | None) -> dict[str, Any] | None:
    """Geometry of E per block on a log axis; zeros have no place on it. None where every E is zero."""
    shown = [(index, value) for index, value in enumerate(errors) if value > 0 and math.isfinite(value)]
    if not shown:
        return None
    lines = [tolerance] if tolerance else []
    logs = [math.log10(value) for value in [*(value for _, value in shown), *lines]]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    centres, _, names = _columns(len(errors))
    every = math.ceil((high - low) / 8)
    return {
        "points": [
            {"x": centres[index], "y": _place(math.log10(value), low, high, BOTTOM, TOP), "block": index + 1, "value": value}
            for index, value in shown
        ],
        "zeros": [index + 1 for index, value in enumerate(errors) if value == 0],
        "names": names,
        "ticks": [(_place(power, low, high, BOTTOM, TOP), power) for power in range(low, high + 1, every)],
        "tolerance": (_place(math.log10(tolerance), low, high, BOTTOM, TOP), tolerance) if tolerance else None,
    }


def _curve(sweep: Sequence[SweepPoint], dense_top1: float | None, here: float) -> dict[str, Any] | None:
    """Geometry of the sweep: top-1 and agreement in percent against MACs removed. None where nothing was measured."""
    lines = {
        name: [(p.reduction, getattr(p, name)) for p in sweep if getattr(p, name) is not None] for name in ("top1", "agreement")
    }
    values = [value for points in lines.values() for _, value in points]
    if not values:
        return None
    values += [] if dense_top1 is None else [dense_top1]
    x_ticks = _ticks(min(0.0, *(100 * p.reduction for p in sweep)), 100 * max(here, *(p.reduction for p in sweep)), 6)
    y_ticks = _ticks(min(values), min(100.0, max(values)))

    def at(x: float, y: float) -> tuple[float, float]:
        return _place(100 * x, x_ticks[0], x_ticks[-1], LEFT, RIGHT), _place(y, y_ticks[0], y_ticks[-1], BOTTOM, TOP)

    return {
        "lines": {name: [{"at": at(x, y), "x": x, "y": y} for x, y in points] for name, points in lines.items()},
        "x_ticks": [(at(tick / 100, y_ticks[0])[0], f"{tick:g}") for tick in x_ticks],
        "ticks": [(at(0, tick)[1], f"{tick:g}") for tick in y_ticks],
        "dense": None if dense_top1 is None else at(0, dense_top1)[1],
        "here": at(here, y_ticks[0])[0],
    }
