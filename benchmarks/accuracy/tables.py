"""``python -m benchmarks.accuracy.tables``: accuracy at equal cost, ours score by score against ToMe, EViT and other ways.

Every row is one way to spend the multiply-accumulates that a budget leaves, measured on the same held-out images. Rows are
written as they are done, and a second call of the same command goes on from there. Calibration and training images are
refused where they may be, or are, among the held-out ones. On a CPU, the same command gives the same rows.

    python -m benchmarks.accuracy.tables --name digits --output benchmarks/accuracy/results/digits.json
    python -m benchmarks.accuracy.tables --show benchmarks/accuracy/results/*.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks.accuracy.bench import Bench, CalibrationDraw, NotMeasured
from benchmarks.accuracy.rows import RESOLUTION, Case, Row, TableOptions, cases
from patchslim.cli import run_command
from patchslim.errors import InputRejected
from patchslim.records import atomic_path


def measure_tables(options: TableOptions) -> dict[str, Any]:
    """Measure every row that is not in ``--output`` yet, writing each as it is done; the results. Raises ``PatchslimError``."""
    options.check()
    bench = Bench(options)
    return measure_cases(bench, cases(bench.options), options.command())


def measure_cases(bench: Bench, wanted: Sequence[Case], command: str, draw: CalibrationDraw | None = None) -> dict[str, Any]:
    """The results with the rows of ``wanted``, those measured anew that are not in ``bench.options.output`` yet.

    ``draw`` is used where a case asks for its mode and seed. Raises ``PatchslimError``.
    """
    options, described = bench.options, bench.described()
    result = {"name": options.name, "command": command, "machine": machine(options), **described}
    result["default"] = {"score": options.default_score, "fit": options.default_fit, "mode": options.modes[0]}
    rows = found_rows(options.output, described)
    for number, case in enumerate(wanted, start=1):
        key = key_of(case, described)
        if key in rows:
            continue
        title, start = f"{number}/{len(wanted)} {case.title()}", time.perf_counter()
        if case.mode is not None and case.seed is not None:
            if draw is not None and (draw.mode, draw.seed) != (case.mode, case.seed):
                draw.close()  # the features of one draw are enough to hold
                draw = None
            draw = draw or CalibrationDraw(bench, case.mode, case.seed)
        row = row_of(bench, draw, case, title)
        seconds = round(time.perf_counter() - start, 1)
        rows[key] = cast("Row", {"key": key, **dataclasses.asdict(case), **row, "seconds": seconds})
        write(options.output, result, rows)
        bench.reporter.say(f"{title}: " + (f"{row['top1']:.2%}" if "top1" in row else row["refused"]))
    return write(options.output, result, rows)


def row_of(bench: Bench, draw: CalibrationDraw | None, case: Case, title: str) -> Row:
    """What is measured of a case, or why it is not."""
    module: Any = bench.model
    row: dict[str, Any] = {"macs": bench.dense_macs, "counts": [bench.reader.tokens] * len(bench.reader.blocks)}
    try:
        if case.mode is not None and draw is not None:
            module, row = draw.slim(case)
        elif case.method == RESOLUTION:
            module, row = bench.on_smaller_images(case)
        elif case.method != "dense":
            module, row = bench.baseline(case)
    except NotMeasured as error:
        return {"refused": f"{case.method}: {error}"}
    reduction = round(1 - row["macs"] / bench.dense_macs, 6)
    return cast("Row", {**row, "reduction": reduction, **bench.accuracy_of(module, title)})


def key_of(case: Case, described: dict[str, Any]) -> str:
    """What a row is a function of, in short."""
    parts = [identity(described), dataclasses.asdict(case)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def identity(described: dict[str, Any]) -> dict[str, Any]:
    """What tells one model, its held-out images and its calibration images from others."""
    model = {name: described["model"][name] for name in ("architecture", "arguments", "weights_sha256")}
    return {"model": model, "evaluation": described["evaluation"], "calibration": described["calibration"]}


def found_rows(path: Path, described: dict[str, Any]) -> dict[str, Row]:
    """The rows measured before, by key; raises ``InputRejected`` where they are of something else."""
    if not path.exists():
        return {}
    found = read(path)
    there = identity(found)
    for part, here in json.loads(json.dumps(identity(described))).items():
        if differing := [name for name in here if there[part].get(name) != here[name]]:
            raise InputRejected(f"{path}: holds results of another {part} (its {', '.join(differing)}): take another --output")
    return {row["key"]: row for row in found["rows"]}


def read(path: Path) -> dict[str, Any]:
    """A results file; raises ``InputRejected``."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(row["key"], str) for row in found["rows"]) or not identity(found):
            raise ValueError("a row has no key")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputRejected(f"{path}: not a results file: {error}") from error
    return found


def write(path: Path, result: dict[str, Any], rows: dict[str, Row]) -> dict[str, Any]:
    """Write the results whole, one row a line, with their summary."""
    from benchmarks.accuracy.plot import compared, summarised

    whole = {**result, "rows": list(rows.values())}
    whole |= {"summary": summarised(whole), "comparisons": compared(whole)}
    lines = []
    for name, value in whole.items():
        text = json.dumps(value)
        if name in ("rows", "summary", "comparisons"):
            text = "[\n  " + ",\n  ".join(json.dumps(each) for each in whole[name]) + "\n ]" if value else "[]"
        lines.append(f" {json.dumps(name)}: {text}")
    with atomic_path(path) as part:
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return whole


def machine(options: TableOptions) -> dict[str, Any]:
    """What the results were measured with."""
    import timm
    import torch

    from patchslim.timing import processor_name

    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    return {
        "cpu": processor_name(),
        "threads": options.threads,
        "device": device,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def main(options: TableOptions) -> int:
    """Measure, or show what was measured; the results as Markdown on stdout."""
    from benchmarks.accuracy.plot import draw, markdown

    results = [read(path) for path in options.show] or [measure_tables(options)]
    print("\n".join(markdown(result) for result in results))
    if options.figure:
        draw(results[0], options.figure)
    return 0


if __name__ == "__main__":
    description = "Accuracy at equal cost: ours, score by score, against ToMe and EViT."
    sys.exit(run_command(TableOptions, main, prog="benchmarks.accuracy.tables", description=description))
