"""What ``benchmarks.speed.matrix`` measured: its file, as Markdown, as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.plot import save
from patchslim.errors import InputRejected
from patchslim.records import atomic_path

_GROUPS = ("what people use", "at the same MACs", "ours")
_DENSE, _DENSE_COLOUR = "dense", "#8a8f98"
#: Colours by how the names of rows begin.
_METHODS = {"ours": "#1f5fc4", "ToMe": "#d9822b", "EViT": "#3a9d5d", "at ": "#b0477a"}
_BACKENDS = {"OpenVINO": "^", "PyTorch": "s", "ONNX Runtime": "o"}
_SIZES = {"fp32": 30, "bf16": 70, "int8": 130}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the results whole."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A results file; raises ``InputRejected``."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all(row["group"] in _GROUPS for model in found["models"] for row in model["rows"]):
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
    """Speed-up at the middle batch against top-1, a panel for each model whose top-1 is known; bars for the others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = result["models"]
    figure, panels = pyplot.subplots(1, len(models), figsize=(8 * len(models), 5.5), squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        batches = sorted({int(batch) for row in model["rows"] for batch in row["speed"]})
        batch = str(batches[len(batches) // 2])
        rows = [row for row in model["rows"] if batch in row["speed"]]
        if all("top1" in row for row in rows):
            _points(axes, rows, batch)
        else:
            axes.barh([row["name"] for row in rows][::-1], [row["speed"][batch]["speedup"] for row in rows][::-1])
        axes.axvline(1, color="#888", linewidth=0.8)
        axes.set_title(f"{model['model']}, batch {batch}", fontsize=11)
        axes.set_xlabel("times as fast as timm's export in ONNX Runtime")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _points(axes: Any, rows: Sequence[dict[str, Any]], batch: str) -> None:
    """A point a row: its colour is the method, its form the backend, its size the precision."""
    from matplotlib.lines import Line2D

    drawn: list[str] = []
    for row in rows:
        method = next((name for name in _METHODS if row["name"].startswith(name)), _DENSE)
        drawn += [] if method in drawn else [method]
        form = next(form for backend, form in _BACKENDS.items() if backend in row["name"])
        axes.scatter(
            row["speed"][batch]["speedup"],
            100 * row["top1"],
            marker=form,
            s=_SIZES[row["multiplies"]],
            color=_METHODS.get(method, _DENSE_COLOUR),
            alpha=0.85,
            linewidths=0,
        )

    def key(label: str, form: str = "o", colour: str = "#555", size: float = 40) -> Line2D:
        return Line2D([], [], marker=form, linestyle="", color=colour, markersize=size**0.5, label=label)

    keys = [key(_titled(name), colour=_METHODS.get(name, _DENSE_COLOUR)) for name in drawn]
    keys += [key(name, form) for name, form in _BACKENDS.items()]
    keys += [key(name, "^", size=size) for name, size in _SIZES.items()]
    axes.legend(handles=keys, fontsize=8, frameon=False, loc="lower right")
    axes.set_ylabel("top-1, %")


def _titled(method: str) -> str:
    return "lower resolution" if method == "at " else method
