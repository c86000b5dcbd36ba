"""Geometry of the page's charts, in the units of their SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from slimming.report.points import SweepPoint

#: Chart area in SVG units, which are CSS pixels at full size: whole width and height, then the axes' box.
WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 508, 20, 220
#: Up to this many blocks have a number on each bar.
MOST_BAR_LABELS = 16
#: The same where a chart is narrow and its text therefore larger; of more blocks every other one is named there.
MOST_NARROW_LABELS = 12

Measure = Literal["top1", "agreement"]


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers at even steps that enclose ``low`` to ``high``; about ``wanted`` of them."""
    span = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor * wanted >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, max(last, first + 1) + 1)]


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    return round(start + (value - low) / (high - low) * (end - start), 2)


def _columns(depth: int) -> tuple[list[float], float, list[tuple[float, int, bool]]]:
    """Centres of the blocks' columns, their width, and the blocks that are named on the axis: on a narrow one too, or not."""
    pitch = (RIGHT - LEFT) / depth
    centres = [round(LEFT + pitch * (index + 0.5), 2) for index in range(depth)]
    every = math.ceil(depth / MOST_BAR_LABELS)
    named = range(0, depth, every)
    step = 1 if len(named) <= MOST_NARROW_LABELS else 2
    return centres, pitch, [(centres[index], index + 1, place % step == 0) for place, index in enumerate(named)]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def bars(slim: Sequence[float], dense: Sequence[float]) -> dict[str, Any]:
    """Geometry of a bar chart: dense bars behind slim ones, one column per block."""
    ticks = _ticks(0, max(dense))
    centres, pitch, names = _columns(len(slim))
    width = round(min(pitch * 0.76, 64), 2)

    def bar(value: float) -> tuple[float, float]:
        top = _place(value, 0, ticks[-1], BOTTOM, TOP)
        return top, round(BOTTOM - top, 2)

    columns = [
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
        "bars": columns,
        "width": width,
        "labelled": len(slim) <= MOST_BAR_LABELS,
        "labelled_narrow": len(slim) <= MOST_NARROW_LABELS,
        "names": names,
        "ticks": [(_place(tick, 0, ticks[-1], BOTTOM, TOP), f"{tick:g}") for tick in ticks],
    }


def error_plot(errors: Sequence[float], tolerance: float | None) -> dict[str, Any] | None:
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


def curve(sweep: Sequence[SweepPoint], which: Measure, here: float, dense_top1: float | None = None) -> dict[str, Any] | None:
    """Geometry of one measure of a sweep, in percent, against MACs removed; None where it was not measured.

    Its axis is its own: top-1 and agreement may lie far apart, and a point of either must be seen. ``here`` is the fraction of
    the MACs that the page's plan removes; ``dense_top1``, in percent, is drawn as a line and is what intervals of a loss are
    against.
    """
    shown = [(point, value) for point in sweep if (value := getattr(point, which)) is not None]
    if not shown:
        return None
    spans = [_span(point, which, dense_top1) for point, _ in shown]
    lines = [] if dense_top1 is None else [dense_top1]
    values = [*lines, *(value for _, value in shown), *(edge for span in spans if span for edge in span)]
    x_ticks = _ticks(min(0.0, *(100 * p.reduction for p in sweep)), 100 * max(here, *(p.reduction for p in sweep)), 6)
    y_ticks = _ticks(max(0.0, min(values)), min(100.0, max(values)))

    def at(x: float, y: float) -> tuple[float, float]:
        inside = min(max(y, y_ticks[0]), y_ticks[-1])
        return _place(100 * x, x_ticks[0], x_ticks[-1], LEFT, RIGHT), _place(inside, y_ticks[0], y_ticks[-1], BOTTOM, TOP)

    return {
        "points": [
            {
                "at": at(point.reduction, value),
                "x": point.reduction,
                "y": value,
                "span": span and [at(0, edge)[1] for edge in span],
            }
            for (point, value), span in zip(shown, spans, strict=True)
        ],
        "x_ticks": [(at(tick / 100, y_ticks[0])[0], f"{tick:g}") for tick in x_ticks],
        "ticks": [(at(0, tick)[1], f"{tick:g}") for tick in y_ticks],
        "dense": None if dense_top1 is None else at(0, dense_top1)[1],
        "here": at(here, y_ticks[0])[0],
        "spans": any(spans),
    }


def _span(point: SweepPoint, which: Measure, dense_top1: float | None) -> tuple[float, float] | None:
    """The 95 % interval of a measured point, percent; that of top-1 is of its loss, laid off from the dense model's."""
    if which == "agreement":
        return point.agreement_interval
    if point.drop_interval is None or dense_top1 is None:
        return None
    low, high = point.drop_interval
    return max(0.0, dense_top1 - high), min(100.0, dense_top1 - low)
