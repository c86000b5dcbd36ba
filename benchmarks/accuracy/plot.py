"""What the rows of ``benchmarks.accuracy.tables`` say: means over seeds, image-by-image comparisons, Markdown, a picture."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.accuracy.rows import Row
from patchslim.records import atomic_path
from validate.comparison import mcnemar

#: What a summary tells methods apart by; the rows that differ in the seed alone are averaged.
LINE: tuple[Literal["method", "fit", "mode", "head_only", "finetune"], ...] = ("method", "fit", "mode", "head_only", "finetune")


def correct_of(row: Row, images: int) -> Any:
    """For each held-out image, whether the row's answer is right: bool (images,)."""
    import numpy as np

    return np.unpackbits(np.frombuffer(base64.b64decode(row["correct"]), dtype=np.uint8), count=images).astype(bool)


def difference_error(gained: int, lost: int, images: int) -> float:
    """Standard error, in percentage points, of the difference of two accuracies on the same images.

    Each image adds 1, -1 or 0 to it: the variance of the mean of those.
    """
    return 100 * math.sqrt(max(0.0, gained + lost - (gained - lost) ** 2 / images)) / images


def spread(values: Iterable[float], digits: int = 6) -> dict[str, float]:
    """Mean, least and most."""
    found = list(values)
    return {"mean": round(sum(found) / len(found), digits), "min": round(min(found), digits), "max": round(max(found), digits)}


def best_forms(rows: Sequence[Row]) -> list[Row]:
    """Of EViT's forms the best at each budget, chosen on the held-out images: in its favour. Other rows as they are."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        place = (row["method"], row["budget"], row["head_only"]) if row["method"] == "EViT" else (row["key"],)
        if place not in best or row["top1"] > best[place]["top1"]:
            best[place] = row
    return list(best.values())


def summarised(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each method and budget: top-1 over the seeds, and its difference to dense in percentage points."""
    images, dense = result["evaluation"]["images"], result["model"]["top1"]
    groups: dict[str, list[Row]] = {}
    for row in best_forms([row for row in result["rows"] if "top1" in row]):
        groups.setdefault(str([row["budget"], *(row[name] for name in LINE)]), []).append(row)
    summary = []
    for rows in groups.values():
        first = rows[0]
        errors = [difference_error(row["gained"], row["lost"], images) for row in rows]
        summary.append(
            dict[str, Any](budget=first["budget"], **{name: first[name] for name in LINE})
            | {
                "default": is_default(first, result["default"]),
                "form": first["form"],
                "seeds": [row["seed"] for row in rows if row["seed"] is not None],
                "top1": spread(row["top1"] for row in rows),
                "difference": spread((100 * (row["top1"] - dense) for row in rows), 4),
                "difference_error": round(sum(errors) / len(errors), 4),
                "agreement": spread(row["agreement"] for row in rows),
                "kl": spread(row["kl"] for row in rows),
                "reduction": spread(row["reduction"] for row in rows),
            }
        )
    return summary


def is_default(row: Row, default: dict[str, Any]) -> bool:
    """Whether a row is of the score, fit and mode that are ours unless others are asked for, and not fine-tuned."""
    of_row = {"score": row["method"], "fit": row["fit"], "mode": row["mode"]}
    return of_row == default and row["finetune"] is None


def compared(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Our default, seed by seed, against each baseline at the same budget, image by image."""
    images = result["evaluation"]["images"]
    rows = best_forms([row for row in result["rows"] if "top1" in row])
    ours = [row for row in rows if is_default(row, result["default"])]
    baselines = [row for row in rows if row["head_only"] is not None]
    entries = []
    for own, baseline in itertools.product(ours, baselines):
        if own["budget"] != baseline["budget"]:
            continue
        mine, theirs = correct_of(own, images), correct_of(baseline, images)
        gained, lost = int((mine & ~theirs).sum()), int((theirs & ~mine).sum())
        entries.append(
            {name: baseline[name] for name in ("budget", "method", "head_only", "form")}
            | {"seed": own["seed"], "only_ours": gained, "only_theirs": lost, "p": round(mcnemar(lost, gained), 6)}
            | {"difference": round(100 * (gained - lost) / images, 4)}
            | {"difference_error": round(difference_error(gained, lost, images), 4)}
        )
    return entries


def title_of(entry: dict[str, Any]) -> str:
    """What a line of the table is called."""
    if entry["head_only"] is not None:
        name = "EViT, best form" if entry["method"] == "EViT" else entry["method"]
        return f"{name}, last block cut" if entry["head_only"] else name
    if entry["method"] == "dense":
        return "dense"
    parts = [entry["method"], entry["fit"].replace("none", "no fit"), *(["stale"] if entry["mode"] == "stale" else [])]
    if entry["finetune"]:
        parts.append(f"fine-tuned {entry['finetune']['epochs']:g} x {entry['finetune']['images']} images")
    name = ", ".join(parts)
    return f"**ours: {name}**" if entry["default"] else name


def markdown(result: dict[str, Any]) -> str:
    """The summary as Markdown tables: methods by budgets, then ours against the baselines."""
    summary = [entry for entry in result["summary"] if entry["method"] != "dense"]
    model, evaluation, calibration = result["model"], result["evaluation"], result["calibration"]
    budgets = sorted({entry["budget"] for entry in summary})
    lines = [
        f"### {result['name']}: {model['name']}, dense {model['top1']:.2%} on {evaluation['images']} held-out images",
        "",
        "Top-1 in percent, the mean over seeds (least–most) where there are several; then the points to dense, ± the standard",
        "error of a difference on the same images. "
        f"Plans are made from {calibration['images']} images of {calibration['data']}.",
        "EViT has the best of its forms at each budget, named in brackets and chosen on the held-out images. The baselines",
        "are also measured with the last block cut to the class token, which is exact, and which our plans have.",
        "",
        "| MACs removed | " + " | ".join(f"{budget:.1%}" for budget in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for title in dict.fromkeys(title_of(entry) for entry in summary):
        cells = {entry["budget"]: cell(entry) for entry in summary if title_of(entry) == title}
        lines.append(f"| {title} | " + " | ".join(cells.get(budget, "") for budget in budgets) + " |")
    removed = []
    for budget in budgets:
        found = [entry["reduction"] for entry in summary if entry["budget"] == budget]
        removed.append(f"{min(each['min'] for each in found):.1%} to {max(each['max'] for each in found):.1%}")
    lines += ["| *in fact removed* | " + " | ".join(removed) + " |", ""]
    if refused := list(dict.fromkeys(row["refused"] for row in result["rows"] if "refused" in row)):
        lines += ["Not measured: " + "; ".join(refused) + ".", ""]
    if result["comparisons"]:
        lines += [
            "| ours against | removed | seed | only ours right | only theirs right | points | McNemar's p |",
            "|---|---|---|---|---|---|---|",
        ]
    for entry in result["comparisons"]:
        title = title_of(entry)
        counts = f"{entry['budget']:.0%} | {entry['seed']} | {entry['only_ours']} | {entry['only_theirs']}"
        lines.append(
            f"| {title} | {counts} | {entry['difference']:+.2f} ± {entry['difference_error']:.2f} | {entry['p']:.3g} |"
        )
    return "\n".join([*lines, ""])


def cell(entry: dict[str, Any]) -> str:
    """Top-1 of one method at one budget."""
    top1, difference = entry["top1"], entry["difference"]["mean"]
    several = f" ({100 * top1['min']:.2f}–{100 * top1['max']:.2f})" if len(entry["seeds"]) > 1 else ""
    form = f" [{entry['form']}]" if entry["form"] else ""
    return f"{100 * top1['mean']:.2f}{several}, {difference:+.2f} ± {entry['difference_error']:.2f}{form}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Top-1 over the MACs in fact removed, a line for ours, for chance and for each baseline; the bars are least and most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.axhline(100 * result["model"]["top1"], color="0.6", linestyle=":", label="dense")
    lines: dict[str, list[dict[str, Any]]] = {}
    for entry in result["summary"]:
        shown = entry["default"] or entry["head_only"] is not None or entry["finetune"]
        chance = entry["method"] == "random" and (entry["fit"], entry["mode"]) == tuple(
            result["default"][name] for name in ("fit", "mode")
        )
        if shown or chance:
            lines.setdefault(title_of(entry).strip("*"), []).append(entry)
    for title, unsorted in lines.items():
        entries = sorted(unsorted, key=lambda entry: float(entry["reduction"]["mean"]))
        tops = [entry["top1"] for entry in entries]
        axes.errorbar(
            [100 * entry["reduction"]["mean"] for entry in entries],
            [100 * top["mean"] for top in tops],
            yerr=[[100 * (top["mean"] - top["min"]) for top in tops], [100 * (top["max"] - top["mean"]) for top in tops]],
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=2.2 if title.startswith("ours") else 1.2,
            label=title,
        )
    axes.set_xlabel("multiply-accumulates removed, %")
    axes.set_ylabel("top-1, %")
    axes.set_title(f"{result['name']}: {result['model']['name']}, {result['evaluation']['images']} held-out images")
    axes.legend(fontsize=7)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure whole and close it, PNG where the name says so, else SVG; always the same bytes."""
    from matplotlib import pyplot

    kind = "png" if path.suffix == ".png" else "svg"
    figure.tight_layout()
    with pyplot.rc_context({"svg.hashsalt": "patchslim"}), atomic_path(path) as part:
        figure.savefig(part, format=kind, metadata={"Date": None} if kind == "svg" else None)
    pyplot.close(figure)
