"""The report's plots, by matplotlib, as SVG that stands in the page: its colours are the page's, light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from patchslim.plan import Walk
from validate.latency_sheet import LatencySheet
from validate.parity_records import ClassChange, ParityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What is drawn in these colours gets the page's own: its ink, its quiet text, its rules, its two hues.
_INK, _QUIET, _RULE, _FIRST, _SECOND, _GHOST = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {_INK: "ink", _QUIET: "quiet", _RULE: "rule", _FIRST: "slim", _SECOND: "second", _GHOST: "ghost"}
_WIDTH = 6.4  # inches
_MOST_CLASSES = 16


def ladder_chart(report: ParityReport) -> str:
    """The drop of every stage that ran, with its 95 % interval, and the gate; "" where nothing has an interval."""
    rungs = [one for one in report.rungs[1:] if one.drop_interval is not None and one.top1_drop is not None]
    if not rungs:
        return ""

    def draw(axes: Axes) -> None:
        for row, one in enumerate(rungs):
            assert one.drop_interval is not None
            assert one.top1_drop is not None
            axes.plot(one.drop_interval, [row, row], color=_FIRST, linewidth=2, solid_capstyle="butt")
            axes.plot([one.top1_drop], [row], "o", color=_FIRST, markersize=6)
        axes.axvline(0, color=_RULE, linewidth=1)
        axes.axvline(report.gate.max_top1_drop, color=_SECOND, linewidth=1.5, linestyle=(0, (5, 3)))
        axes.set_yticks(range(len(rungs)), [one.stage for one in rungs])
        axes.set_ylim(len(rungs) - 0.5, -0.5)
        axes.set_xlabel("points of top-1 lost, with 95 % interval; dashed: the gate")

    return _svg(draw, 0.9 + 0.34 * len(rungs), "Points of top-1 that each stage lost, with 95 % intervals, and the gate")


def accuracy_chart(report: ParityReport) -> str:
    """Top-1 against MACs: the original and the last stage that ran; "" without labels."""
    compared = report.comparison
    if compared is None or compared.original.top1 is None or compared.candidate.top1 is None:
        return ""
    last = next(one for one in report.rungs if one.stage == compared.candidate.stage)
    low, high = last.drop_interval or (0.0, 0.0)
    original, candidate = compared.original.top1, compared.candidate.top1
    macs = report.macs

    def draw(axes: Axes) -> None:
        axes.plot([macs.dense / 1e9], [original], "s", color=_QUIET, markersize=7)
        axes.annotate("original", (macs.dense / 1e9, original), (0, 9), textcoords="offset points", color=_QUIET, ha="center")
        axes.plot([macs.slim / 1e9] * 2, [original - high, original - low], color=_FIRST, linewidth=2)
        axes.plot([macs.slim / 1e9], [candidate], "o", color=_FIRST, markersize=8)
        axes.annotate("slim", (macs.slim / 1e9, candidate), (10, -4), textcoords="offset points", color=_INK)
        axes.axhline(original - report.gate.max_top1_drop, color=_SECOND, linewidth=1.5, linestyle=(0, (5, 3)))
        axes.set_xlim(0, 1.15 * macs.dense / 1e9)
        bottom, top = min(original - high, original - report.gate.max_top1_drop, candidate), max(original - low, original)
        margin = 0.25 * max(top - bottom, 0.2)
        axes.set_ylim(max(0, bottom - margin), min(101, top + 1.6 * margin))
        axes.set_xlabel("GMACs of one image")
        axes.set_ylabel("top-1, %")

    return _svg(draw, 2.7, "Top-1 against multiply-accumulates, original and slim, with the 95 % interval and the gate")


def walk_chart(walk: Walk | None, dense_macs: int) -> str:
    """What was tried on the way to the largest reduction; "" where none was looked for."""
    if walk is None or not walk.points:
        return ""
    labelled = walk.dense_top1 is not None

    def draw(axes: Axes) -> None:
        for point in walk.points:
            at = 100 * (1 - point.macs / dense_macs)
            axes.plot([at, at], point.interval, color=_FIRST, linewidth=2, solid_capstyle="butt")
            axes.plot([at], [point.drop], "o", color=_FIRST if point.within else _QUIET, markersize=6)
        axes.axhline(0, color=_RULE, linewidth=1)
        axes.axhline(walk.margin, color=_SECOND, linewidth=1.5, linestyle=(0, (5, 3)))
        axes.set_xlabel("MACs removed, %")
        axes.set_ylabel("points of top-1 lost" if labelled else "answers changed, %")

    lost = "Points of top-1 lost" if labelled else "Answers changed"
    return _svg(draw, 2.7, f"{lost} against MACs removed, on the calibration images, with 95 % intervals and the margin")


def latency_chart(sheet: LatencySheet) -> str:
    """Milliseconds of one image, dense and slim, by batch size; "" where nothing was timed."""
    if not sheet.comparisons:
        return ""

    def draw(axes: Axes) -> None:
        for row, one in enumerate(sheet.comparisons):
            dense, slim = one.dense_ms / one.batch, one.slim_ms / one.batch
            axes.barh(row - 0.19, dense, 0.34, color=_GHOST)
            axes.barh(row + 0.19, slim, 0.34, color=_FIRST)
            words = f"{slim:.3g}, {one.speedup:.2f} times as fast"
            for value, at, text, colour in ((dense, row - 0.19, f"{dense:.3g}", _QUIET), (slim, row + 0.19, words, _INK)):
                axes.annotate(text, (value, at), (5, 0), textcoords="offset points", color=colour, va="center")
        axes.set_yticks(range(len(sheet.comparisons)), [f"batches of {one.batch}" for one in sheet.comparisons])
        axes.set_ylim(len(sheet.comparisons) - 0.5, -0.5)
        axes.set_xlim(0, 1.25 * max(one.dense_ms / one.batch for one in sheet.comparisons))
        axes.set_xlabel("milliseconds an image: dense above, slim below")

    return _svg(draw, 0.9 + 0.6 * len(sheet.comparisons), "Milliseconds of one image, dense and slim, by batch size")


def class_chart(changes: Sequence[ClassChange], names: Sequence[str]) -> str:
    """Images won and lost, class by class, the most changed first; "" where no class changed."""
    shown = sorted(changes, key=lambda one: (-abs(one.candidate - one.original), one.label))[:_MOST_CLASSES]
    shown.sort(key=lambda one: (one.candidate - one.original, one.label))
    if not shown:
        return ""

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for row, one in enumerate(shown):
            change = one.candidate - one.original
            axes.barh(row, change, 0.6, color=_SECOND if change < 0 else _FIRST)
        axes.axvline(0, color=_RULE, linewidth=1)
        axes.set_yticks(range(len(shown)), [name_of(one.label, names) for one in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("images more (or fewer) answered rightly than by the original")

    return _svg(draw, 0.9 + 0.26 * len(shown), "Images won and lost in each class that changed")


def name_of(label: int, names: Sequence[str], longest: int = 28) -> str:
    """A class's name, cut to ``longest`` characters, or its number."""
    name = names[label] if label < len(names) else f"class {label}"
    return name if len(name) <= longest else name[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _svg(draw: Callable[[Axes], Any], height: float, title: str) -> str:
    """What ``draw`` makes of axes, as an SVG element; the same input gives the same text."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "patchslim",
        "font.size": 9,
        "font.family": "sans-serif",
        "text.parse_math": False,
        "axes.edgecolor": _RULE,
        "axes.labelcolor": _QUIET,
        "xtick.color": _QUIET,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(_WIDTH, height), layout="constrained")
        try:
            draw(axes)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        finally:
            pyplot.close(figure)
    return _in_page(buffer.getvalue(), title)


def _in_page(svg: str, title: str) -> str:
    """The element alone, named for those who cannot see it, without a size, font or colour of its own."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg class="plot" role="img" aria-label="{title}" viewBox="\1">', svg
    )
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)  # names of groups, which several plots of a page would share
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
