"""What ``benchmarks.speed.matrix`` measured: its file, as Markdown, as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy.plot import save
from patchslim.errors import InputRejected
from patchslim.records import atomic_path

_COLOURS = {"what people use": "#8a8f98", "at the same MACs": "#d08a2e", "ours": "#2e6fd0"}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the results whole."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A results file; raises ``InputRejected``."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all(row["group"] in _COLOURS for model in found["models"] for row in model["rows"]):
            raise ValueError("a row is of no known group")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputRejected(f"{path}: not a results file of benchmarks.speed.matrix: {error}") from error
    return found


def markdown(result: dict[str, Any]) -> str:
    """A table for each model: speed against the plain export by batch, the share of the machine's GEMM rate, top-1."""
    machine = result["machine"]
    lines = [f"## {result['name']}", "", f"{machine['cpu']}, {machine['threads']} threads; `{result['command']}`", ""]
    for model in result["models"]:
        batches = sorted({int(batch) for row in model["rows"] for batch in row["speed"]})
        rates = ", ".join(f"{kind} {rate:g} GFLOP/s" for kind, rate in model["gemm_gflops"].items())
        lines += [f"### {model['model']}", "", f"Square matrix products: {rates}.", ""]
        lines += [
            "| | MACs | " + " | ".join(f"batch {batch}" for batch in batches) + " | of GEMM rate | top-1 |",
            "|---" * (len(batches) + 4) + "|",
        ]
        for row in model["rows"]:
            cells = [_cell(row["speed"].get(str(batch))) for batch in batches]
            share = row["speed"].get(str(batches[-1]), {}).get("gemm_share")
            top1 = f"{row['top1']:.2%}" if "top1" in row else "failed" if "fault" in row else ""
            name = f"**{row['name']}**" if row["group"] == "ours" else row["name"]
            macs = f"{row['macs'] / model['dense_macs']:.2f}"
            lines.append(
                f"| {name} | {macs} | " + " | ".join(cells) + f" | {'' if share is None else f'{share:.0%}'} | {top1} |"
            )
        lines.append("")
    return "\n".join(lines)


def _cell(speed: dict[str, float] | None) -> str:
    if speed is None:
        return ""
    return f"{speed['speedup']:.2f} ({speed['speedup_p25']:.2f}–{speed['speedup_p75']:.2f})"


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of the speed-up at the middle batch, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = result["models"]
    tallest = max(len(model["rows"]) for model in models)
    figure, panels = pyplot.subplots(1, len(models), figsize=(6.5 * len(models), 1 + 0.26 * tallest), squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        batches = sorted({int(batch) for row in model["rows"] for batch in row["speed"]})
        batch = str(batches[len(batches) // 2])
        rows = [row for row in model["rows"] if batch in row["speed"]][::-1]
        middle = [row["speed"][batch]["speedup"] for row in rows]
        spread = [
            [at - row["speed"][batch]["speedup_p25"] for at, row in zip(middle, rows, strict=True)],
            [row["speed"][batch]["speedup_p75"] - at for at, row in zip(middle, rows, strict=True)],
        ]
        axes.barh(range(len(rows)), middle, xerr=spread, color=[_COLOURS[row["group"]] for row in rows], ecolor="#444")
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        axes.axvline(1, color="#444", linewidth=0.8)
        axes.set_title(f"{model['model']}, batch {batch}", fontsize=10)
        axes.set_xlabel("times the plain export in ONNX Runtime")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
