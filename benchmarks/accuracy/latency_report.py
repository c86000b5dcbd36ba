"""What the rows of ``benchmarks.accuracy.latency`` say: baselines' lines at our latency, results files, Markdown, a picture."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy.plot import save
from patchslim.errors import InputRejected
from patchslim.records import atomic_path


def lines_of(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The baselines' rows by line, the fastest first; each line starts from the dense model that its baseline reduces."""
    lines: dict[str, list[dict[str, Any]]] = {}
    baselines = [row for row in rows if "latency_ms" in row and row["method"] in ("ToMe", "EViT")]
    for row in baselines:
        name = "EViT, best form" if row["method"] == "EViT" else row["method"]
        lines.setdefault(name + (", last block cut" if row["head_only"] else ""), []).append(row)
    dense = {row["head_only"]: row for row in rows if row["method"] == "dense"}
    for title, line in lines.items():
        line += [dense[None], *([dense[True]] if title.endswith("cut") else [])]
        line.sort(key=lambda row: float(row["latency_ms"]))
    return lines


def at_latency(line: list[dict[str, Any]], latency: float) -> float | None:
    """Top-1 of a baseline's line at a latency, linear between its points; None where its fastest point is slower.

    In its favour: a point that is both slower and worse than another is left out, though the line went through it.
    """
    import numpy as np

    frontier: list[dict[str, Any]] = []
    for row in line:
        if not frontier or row["top1"] > frontier[-1]["top1"]:
            frontier.append(row)
    if latency < frontier[0]["latency_ms"]:
        return None
    return float(np.interp(latency, [row["latency_ms"] for row in frontier], [row["top1"] for row in frontier]))


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of our rows against each baseline's line at our latency; ``lead`` in percentage points."""
    entries = []
    ours = [row for row in rows if row["fit"] and "latency_ms" in row]
    for row, (title, line) in itertools.product(ours, lines_of(rows).items()):
        theirs = at_latency(line, row["latency_ms"])
        entry = {name: row[name] for name in ("method", "budget", "seed", "reduction", "latency_ms", "ratio_to_dense", "top1")}
        entry |= {"rival": title, "reached": theirs is not None, "rival_top1": None if theirs is None else round(theirs, 6)}
        entry |= {"lead": None if theirs is None else round(100 * (row["top1"] - theirs), 4)}
        entries.append(entry | {"rival_fastest_ms": line[0]["latency_ms"], "rival_fastest_top1": line[0]["top1"]})
    return entries


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the results whole, one row a line."""
    lines = []
    for name, value in result.items():
        listed = isinstance(value, list) and value
        text = "[\n  " + ",\n  ".join(json.dumps(each) for each in value) + "\n ]" if listed else json.dumps(value)
        lines.append(f" {json.dumps(name)}: {text}")
    with atomic_path(path) as part:
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A results file; raises ``InputRejected``."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not found["rows"] or not found["timing"] or not isinstance(found["summary"], list):
            raise ValueError("it has no timed rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputRejected(f"{path}: not a results file of benchmarks.accuracy.latency: {error}") from error
    return found


def title_of(row: dict[str, Any]) -> str:
    """What a row of the table is called."""
    if row["fit"]:
        return f"**ours: {row['method']}" + ("**" if row["fit"] == "distill" else f", {row['fit'].replace('none', 'no fit')}**")
    form = f" ({row['form']})" if row.get("form") else ""
    return str(row["method"]) + form + (", last block cut" if row["head_only"] else "")


def markdown(result: dict[str, Any]) -> str:
    """Every model's time and accuracy, then ours against the baselines at our latency."""
    model, timing, rows = result["model"], result["timing"], [row for row in result["rows"] if "latency_ms" in row]
    lines = [
        f"### {result['name']}: {model['name']}, top-1 on {result['evaluation']['images']} held-out images at measured latency",
        "",
        f"ONNX Runtime {result['machine']['onnxruntime']} on {result['machine']['cpu']}, {timing['threads']} thread(s), "
        f"batches of {timing['batch']}; medians of {timing['rounds']} interleaved rounds, {timing['clock']} time.",
        "",
        "| model | MACs removed | ms (quartiles) | time to dense | top-1 | same answer as dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -float(row["latency_ms"])):
        quartiles = f"{row['latency_ms']:.2f} ({row['latency_p25']:.2f}–{row['latency_p75']:.2f})"
        share = f"{row['ratio_to_dense']:.3f} | {100 * row['top1']:.2f} | {row['agreement']:.1%}"
        lines.append(f"| {title_of(row)} | {row['reduction']:.1%} | {quartiles} | {share} |")
    seeded = len({entry["seed"] for entry in result["summary"]} - {None}) > 1
    lines += [
        "",
        "| ours at | ms | top-1 | baseline at that latency | its top-1 | our lead, points |",
        "|---|---|---|---|---|---|",
    ]
    for entry in result["summary"]:
        ours = f"{entry['method']}, {entry['reduction']:.1%}" + (
            f", seed {entry['seed']}" if seeded and entry["seed"] is not None else ""
        )
        theirs = (
            f"{100 * entry['rival_top1']:.2f} | {entry['lead']:+.2f}"
            if entry["reached"]
            else (f"not reached: {100 * entry['rival_fastest_top1']:.2f} at {entry['rival_fastest_ms']:.2f} ms | ")
        )
        lines.append(f"| {ours} | {entry['latency_ms']:.2f} | {100 * entry['top1']:.2f} | {entry['rival']} | {theirs} |")
    if refused := list(dict.fromkeys(row["refused"] for row in result["rows"] if "refused" in row)):
        lines += ["", "Not measured: " + "; ".join(refused) + "."]
    return "\n".join([*lines, ""])


def draw(result: dict[str, Any], path: Path) -> None:
    """Top-1 over latency: ours, a line for each seed, and each baseline's line from the dense model on; always equal bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "latency_ms" in row]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if row["fit"]):
        seed = "" if row["seed"] is None else f", seed {row['seed']}"
        lines.setdefault(title_of(row).strip("*") + seed, []).append(row)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for title, line in (lines | lines_of(rows)).items():
        line = sorted(line, key=lambda row: float(row["latency_ms"]))
        points = [row["latency_ms"] for row in line], [100 * row["top1"] for row in line]
        axes.plot(*points, marker="o", markersize=4, linewidth=2.2 if title.startswith("ours") else 1.2, label=title)
    axes.plot(rows[0]["latency_ms"], 100 * rows[0]["top1"], marker="s", color="0.3", linestyle="", label="dense")
    axes.set_xlabel(f"ONNX Runtime, ms for {result['timing']['batch']} images, {result['timing']['threads']} thread(s)")
    axes.set_ylabel("top-1, %")
    axes.set_title(f"{result['name']}: {result['model']['name']}, {result['evaluation']['images']} held-out images")
    axes.legend(fontsize=7)
    save(figure, path)
