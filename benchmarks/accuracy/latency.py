"""``python -m benchmarks.accuracy.latency``: accuracy at equal measured latency in ONNX Runtime, ours against ToMe and EViT.

Ours is the ONNX file of the bundle that ``export.run`` makes: of the default plan, ``blocks-auto``, unless ``--plans`` says
otherwise. A distilled model (``--distilled``) has the times of the plan that has its counts. Every model is timed on a CPU, all
of them in turn, in a new order each round. The baselines are exported as they stand and rewritten for ONNX Runtime
(``baselines_onnx``), and the faster counts; of EViT's forms the best one counts. What a baseline's line reaches at our latency
is read in its favour too: see ``latency_report.at_latency``.

    python -m benchmarks.accuracy.latency --name digits --work build/latency --prepare   # slow; the machine may be busy
    python -m benchmarks.accuracy.latency --name digits --work build/latency --output digits-latency.json
    python -m benchmarks.accuracy.latency --show benchmarks/accuracy/results/*-latency.json
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.accuracy import alternatives, tables
from benchmarks.accuracy.bench import Bench
from benchmarks.accuracy.latency_exports import RowExporter
from benchmarks.accuracy.latency_report import draw, markdown, read, summarised, write
from benchmarks.accuracy.rows import BLOCKS, DEFAULT, FITS, Case, SubjectOptions, TableOptions, is_blocks
from patchslim.arrays import Array
from patchslim.choices import FitChoice, ScoreName
from patchslim.cli import run_command
from patchslim.errors import InputRejected, UsageError
from patchslim.progress import Progress

#: The plan whose tokens go in every block.
RAMP = "ramp"
#: What a timed row says of its fastest export.
TIMES = ("latency_ms", "latency_p25", "latency_p75", "wall_ms", "ratio_to_dense")


@dataclasses.dataclass(frozen=True)
class EqualLatencyOptions(SubjectOptions):
    """Options of ``benchmarks.accuracy.latency``."""

    baseline_budgets: Annotated[tuple[float, ...], tyro.conf.arg(aliases=["--rival-budgets"])] = (0.30, 0.45, 0.60, 0.70, 0.80)
    """Those that the baselines remove. As they lose time to choosing, they need more for the same latency."""
    head_only: tuple[bool, ...] = (False, True)
    """Baselines with the last block as it is (False) or cut to the class token (True), as ours is."""
    seeds: tuple[int, ...] = (0,)
    """Each draws its own calibration images."""
    plans: tuple[str, ...] = (f"{BLOCKS}auto",)
    """Our plans: blocks-auto, the default; blocks-N; ramp, which cuts in every block."""
    distilled: Path | None = None
    """Results of benchmarks.accuracy.alternatives with distilled models of plans that are timed here."""
    score: ScoreName = DEFAULT.score
    """The score of ramps; auto is the one that slimming.run takes."""
    fit: FitChoice = DEFAULT.fit
    """The fit of our plans."""
    batch: int = 8
    """Images per timed run."""
    rounds: int = 40
    """How often each model is timed: by its CPU time with one thread, by wall time with several."""
    tables: Path | None = None
    """Results of benchmarks.accuracy.tables: what is in them, of the same counts, is not evaluated again."""
    work: Path | None = None
    """A folder that keeps exported models and their accuracy, so that a second call only times them."""
    prepare: bool = False
    """Export and evaluate into --work, and do not time: for a machine that is busy."""
    output: Path = Path("latency.json")
    """The JSON file of results."""
    show: tuple[Path, ...] = ()
    """Instead of measuring: print these results as Markdown."""
    figure: Path | None = None
    """Draw the results, or the first of those shown, here: SVG or PNG."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if not self.budgets or not all(0 < value < 1 for value in (*self.budgets, *self.baseline_budgets)):
            raise UsageError("--budgets and --baseline-budgets are fractions between 0 and 1, and --budgets needs one")
        if min(self.batch, self.threads, self.rounds) < 1 or not self.seeds:
            raise UsageError("--batch, --threads and --rounds must be at least 1, and --seeds needs a value")
        if self.fit not in FITS:
            raise UsageError(f"--fit {self.fit}: the tables have {' and '.join(FITS)}")
        if unknown := [name for name in self.plans if name != RAMP and not is_blocks(name)]:
            raise UsageError(f"--plans {unknown[0]}: must be {RAMP}, {BLOCKS}auto or {BLOCKS}N, as {BLOCKS}3")
        if not self.plans:
            raise UsageError("--plans needs a value")
        if self.prepare and self.work is None:
            raise UsageError("--prepare needs --work, a folder for what it makes")
        self.of_tables().check()

    def of_tables(self) -> TableOptions:
        """The options of the tables' bench that measures accuracy."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(SubjectOptions)}
        return TableOptions(**shared, seeds=self.seeds, default_score=self.score, default_fit=self.fit)

    def command(self) -> str:
        """The command line that these options come from."""
        return self.command_of("benchmarks.accuracy.latency", ("figure", "work"))


def cases(options: EqualLatencyOptions) -> list[Case]:
    """Every model to export; ``dense`` with the last block cut is the exact saving that every baseline may have."""
    rows = [Case("dense")] + [Case("dense", head_only=True)] * (True in options.head_only)
    for plan, seed, budget in itertools.product(options.plans, options.seeds, options.budgets):
        rows.append(Case(options.score if plan == RAMP else plan, budget, options.fit, "compact", seed))
    for cut, budget in itertools.product(options.head_only, options.baseline_budgets):
        rows += [Case("ToMe", budget, head_only=cut), Case("EViT", budget, head_only=cut, form="best")]
    return rows


def clocked(run: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    """Return what runs a model twice and gives the second run's seconds: CPU time of the calling thread, and wall time.

    The first run brings its weights as near as they are to a model that serves.
    """

    def seconds() -> tuple[float, float]:
        run()
        wall, cpu = time.perf_counter(), time.thread_time()
        run()
        return time.thread_time() - cpu, time.perf_counter() - wall

    return seconds


def seconds_of(paths: Sequence[Path], pixels: Array, options: EqualLatencyOptions, progress: Progress) -> Array:
    """Seconds (2, rounds, models) of one batch: CPU time of the calling thread, and wall time."""
    import numpy as np

    from patchslim.ort_runner import OrtModel
    from patchslim.timing import interleaved

    models = [OrtModel(path, threads=options.threads) for path in paths]
    runs = [clocked(partial(model.run, {model.inputs[0].name: pixels})) for model in models]
    return np.asarray(interleaved(runs, options.rounds, progress=progress)).transpose(2, 0, 1)


def measure_at_equal_latency(options: EqualLatencyOptions) -> dict[str, Any] | None:
    """Export, evaluate, time and write ``--output``; None after ``--prepare``. Raises ``PatchslimError``."""
    options.check()
    bench = Bench(options.of_tables())
    command, options = options.command(), dataclasses.replace(options, score=bench.options.default_score)
    distilled = distilled_rows(options.distilled, bench) if options.distilled else []
    with tempfile.TemporaryDirectory(prefix="patchslim-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        known = tables.found_rows(options.tables, bench.described()) if options.tables else {}
        exporter = RowExporter(bench, folder, batch=options.batch, known=known)
        rows = [exporter.row(case) for case in cases(options)]
        if options.prepare:
            return None
        add_times(rows, folder, bench, options)
    rows += with_times_of(rows, distilled)
    import onnxruntime

    machine = tables.machine(options.of_tables()) | {"onnxruntime": onnxruntime.__version__}
    result = {"name": options.name, "command": command, "machine": machine, **exporter.described}
    result["default"] = {"score": options.score, "fit": options.fit, "mode": "compact"}
    clock = "cpu" if options.threads == 1 else "wall"
    result["timing"] = {"batch": options.batch, "threads": options.threads, "rounds": options.rounds, "clock": clock}
    result |= {"rows": rows, "summary": summarised(rows)}
    write(options.output, result)
    return result


def add_times(rows: list[dict[str, Any]], folder: Path, bench: Bench, options: EqualLatencyOptions) -> None:
    """Time every export, and put into each row the times of its fastest."""
    import numpy as np

    from patchslim.timing import level_rounds

    exports = [(row, name) for row in rows for name in row.get("exports", {})]
    pixels = bench.pixels[[index % len(bench.pixels) for index in range(options.batch)]].numpy()
    with bench.reporter.bar("timing", unit="rounds") as update:
        paths = [folder / row["exports"][name]["file"] for row, name in exports]
        times = seconds_of(paths, pixels, options, update)
    clock, wall = times[0 if options.threads == 1 else 1], times[1]
    low, middle, high = 1e3 * np.percentile(level_rounds(clock), [25, 50, 75], axis=0)
    ratios = np.median(clock / clock[:, :1], axis=0)  # the first is dense
    for index, (row, name) in enumerate(exports):
        export = row["exports"][name]
        export.pop("file")
        export |= {"latency_ms": middle[index], "latency_p25": low[index], "latency_p75": high[index]}
        export |= {"wall_ms": 1e3 * np.median(wall[:, index]), "ratio_to_dense": ratios[index]}
        export |= {key: round(float(value), 9 if "error" in key else 4) for key, value in export.items() if key != "apart"}
    for row in rows:
        if "exports" in row:
            row["export"] = min(row["exports"], key=lambda name: float(row["exports"][name]["latency_ms"]))
            fastest = row["exports"][row["export"]]
            row |= {name: fastest[name] for name in TIMES}


def distilled_rows(path: Path, bench: Bench) -> list[dict[str, Any]]:
    """The rows of distilled models that ``path`` holds; they may come from more calibration images than the plans here.

    Raises ``InputRejected`` where they are of another model or of other held-out images.
    """
    found, described = alternatives.read(path), json.loads(json.dumps(tables.identity(bench.described())))
    for part in ("model", "evaluation"):
        if tables.identity(found)[part] != described[part]:
            raise InputRejected(f"{path}: holds results of another {part}: take the same --weights, --data and --eval-images")
    return [row for row in found["rows"] if "distilled" in row]


def with_times_of(rows: list[dict[str, Any]], distilled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each distilled model, with the times of the plan that has its counts, or ``refused`` where none is timed."""
    timed = {tuple(row["counts"]): row for row in rows if row["fit"] and "latency_ms" in row}
    found = []
    for row in distilled:
        told = f"distilled, {row['distilled']['steps']} steps"
        own = {"method": told, "budget": row["budget"], "fit": "distill", "seed": None, "head_only": None}
        if plan := timed.get(tuple(row["counts"])):
            answers = {name: row[name] for name in ("macs", "counts", "reduction", "top1", "agreement")}
            times = {name: plan[name] for name in TIMES}
            found.append(own | answers | {"images": plan["images"], "times_of": plan["method"]} | times)
        else:
            found.append(own | {"refused": f"{told}, {row['budget']:.0%}: no plan of its counts is timed"})
    return found


def main(options: EqualLatencyOptions) -> int:
    """Measure, or show what was measured; the results as Markdown on stdout."""
    results = [read(path) for path in options.show]
    if not results:
        measured = measure_at_equal_latency(options)
        if measured is None:
            return 0
        results = [measured]
    print("\n".join(markdown(result) for result in results))
    if options.figure:
        draw(results[0], options.figure)
    return 0


if __name__ == "__main__":
    description = "Accuracy at equal measured latency in ONNX Runtime: ours against ToMe and EViT."
    sys.exit(run_command(EqualLatencyOptions, main, prog="benchmarks.accuracy.latency", description=description))
