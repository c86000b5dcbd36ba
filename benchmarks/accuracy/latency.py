"""``python -m benchmarks.accuracy.latency``: accuracy at equal measured latency in ONNX Runtime, ours against ToMe and EViT.

Every model is exported to ONNX and timed on a CPU, all of them in turn, in a new order each round. The rivals are exported as
they stand and rewritten for ONNX Runtime (``rivals_onnx``), and the faster counts; of EViT's forms the best one counts. What a
rival's line reaches at our latency is told in its favour too: see ``at_latency``.

    python -m benchmarks.accuracy.latency --name digits --work build/latency --prepare   # slow; the machine may be busy
    python -m benchmarks.accuracy.latency --name digits --work build/latency --output digits-latency.json
    python -m benchmarks.accuracy.latency --show benchmarks/accuracy/results/*-latency.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy import tables
from benchmarks.accuracy.bench import Bench, NotMeasured, Ours
from benchmarks.accuracy.latency_report import draw, markdown, read, summarised, write
from benchmarks.accuracy.rows import EVIT_FORMS, FITS, Case, Subject
from benchmarks.accuracy.rows import Options as TableOptions
from patchslim.choices import Fit, ScoreName
from patchslim.cli import run_command
from patchslim.errors import UsageError
from patchslim.records import atomic_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: An exported model must answer like the PyTorch one: logits within this, on all but ``FLIPS`` of the images that are compared.
TOLERANCE, COMPARED = 1e-4, 64
#: A rival that chooses at run time chooses otherwise where rounding decides between two all but equal tokens.
FLIPS = 0.05
_WARMUP = 2


@dataclasses.dataclass(frozen=True)
class Options(Subject):
    """Options of ``benchmarks.accuracy.latency``."""

    rival_budgets: tuple[float, ...] = (0.30, 0.45, 0.60, 0.70, 0.80)
    """Those that the rivals remove: as they lose time to choosing, they need more for the same latency."""
    head_only: tuple[bool, ...] = (False, True)
    """Rivals with the last block as it is (False) or cut to the class token (True), as ours is."""
    seeds: tuple[int, ...] = (0,)
    """Each draws its own calibration images."""
    score: ScoreName = "similarity"
    """The score of our plans."""
    fit: Fit = "closed-form"
    """The fit of our plans."""
    batch: int = 8
    """Images per timed run."""
    rounds: int = 40
    """How often each model is timed: by its CPU time with one thread, by wall time with several."""
    tables: Path | None = None
    """Results of benchmarks.accuracy.tables: rivals that are in them are not evaluated again."""
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
        if not self.budgets or not all(0 < value < 1 for value in (*self.budgets, *self.rival_budgets)):
            raise UsageError("--budgets and --rival-budgets are fractions between 0 and 1, and --budgets needs one")
        if min(self.batch, self.threads, self.rounds) < 1 or not self.seeds:
            raise UsageError("--batch, --threads and --rounds must be at least 1, and --seeds needs a value")
        if self.fit not in FITS:
            raise UsageError(f"--fit {self.fit}: the tables have {' and '.join(FITS)}")
        if self.prepare and self.work is None:
            raise UsageError("--prepare needs --work, a folder for what it makes")
        self.of_tables().check()

    def of_tables(self) -> TableOptions:
        """The options of the tables' bench that measures accuracy."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Subject)}
        return TableOptions(**shared, seeds=self.seeds, default_score=self.score, default_fit=self.fit)

    def command(self) -> str:
        """The command line that these options come from."""
        return self.command_of("benchmarks.accuracy.latency", ("figure", "work"))


def cases(options: Options) -> list[Case]:
    """Every model to export; ``dense`` with the last block cut is the exact saving that every rival may have."""
    rows = [Case("dense")] + [Case("dense", head_only=True)] * (True in options.head_only)
    for seed, budget in itertools.product(options.seeds, options.budgets):
        rows.append(Case(options.score, budget, options.fit, "compact", seed))
    for cut, budget in itertools.product(options.head_only, options.rival_budgets):
        rows += [Case("ToMe", budget, head_only=cut), Case("EViT", budget, head_only=cut, form="best")]
    return rows


class Workshop:
    """Makes the ONNX files of each case and their row, but for the times; what ``folder`` has already is not made again."""

    def __init__(self, options: Options, bench: Bench, folder: Path) -> None:
        self.options, self.bench, self.folder = options, bench, folder
        self.described = bench.described()
        self.known = tables.found_rows(options.tables, self.described) if options.tables else {}
        self.ours: Ours | None = None

    def row(self, case: Case) -> dict[str, Any]:
        """The case's row; ``exports`` names its ONNX files."""
        key = f"{tables.key_of(case, self.described)}-{self.options.batch}"
        path = self.folder / f"{key}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        row = {"method": case.method, "budget": case.budget, "fit": case.fit, "seed": case.seed, "head_only": case.head_only}
        try:
            made = self.slim(case, key) if case.mode else self.dense(key) if case == Case("dense") else self.rival(case, key)
        except NotMeasured as error:
            made = {"refused": f"{case.method}: {error}"}
        if "macs" in made:
            made["reduction"] = round(1 - made["macs"] / self.bench.dense_macs, 6)
            made["images"] = len(self.bench.images)
        with atomic_path(path) as part:
            part.write_text(json.dumps(row | made), encoding="utf-8")
        return row | made

    def dense(self, key: str) -> dict[str, Any]:
        """The original."""
        module, macs = self.bench.model, self.bench.dense_macs
        return {
            "macs": macs,
            **self.accuracy(module, "dense"),
            "exports": {"plain": self.export(module, module, f"{key}-plain")},
        }

    def slim(self, case: Case, key: str) -> dict[str, Any]:
        """Ours: the fitted weights exported dense, and the plan's tokens cut out of that graph."""
        from graph_passes import slim

        if self.ours is None or self.ours.seed != case.seed:
            self.ours = Ours(self.bench, "compact", case.seed or 0)
        module, row = self.ours.slim(case)
        path = self.export(module.model, module, f"{key}-plain", lambda model: slim(model, module.plan).model)
        return row | self.accuracy(module, case.title()) | {"exports": {"plain": path}}

    def rival(self, case: Case, key: str) -> dict[str, Any]:
        """ToMe, or EViT in the form that is best on the held-out images, as it stands and rewritten for ONNX Runtime."""
        from benchmarks.accuracy.baselines import ToMeViT
        from benchmarks.accuracy.baselines_onnx import lean

        if case.method == "dense":
            cut = ToMeViT(self.bench.model, 0, head_only=True)
            row = {"macs": cut.macs(), "counts": cut.counts, **self.accuracy(cut, "dense, last block cut")}
            return row | {"exports": {"plain": self.export(cut, cut, f"{key}-plain")}}
        forms = [dataclasses.replace(case, form=form) for form in (EVIT_FORMS if case.form else (None,))]
        found = []
        for form in forms:
            module, row = self.bench.rival(form)
            measured = self.known.get(tables.key_of(form, self.described), {})
            if "top1" not in measured or measured["counts"] != row["counts"]:
                measured = self.accuracy(module, form.title())
            found.append((module, row | {name: measured[name] for name in ("top1", "agreement")} | {"form": form.form}))
        module, row = max(found, key=lambda each: float(each[1]["top1"]))
        name = f"{key}-{row['form']}" if case.form else key
        exports = {"plain": self.export(module, module, f"{name}-plain")}
        exports["lean"] = self.export(lean(module), module, f"{name}-lean")
        return row | {"exports": exports}

    def accuracy(self, module: Any, title: str) -> dict[str, Any]:
        """Top-1 and agreement of the PyTorch module on the held-out images."""
        measured = self.bench.measured(module, title)
        return {name: measured[name] for name in ("top1", "agreement")}

    def export(self, module: Any, reference: Any, name: str, change: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Export for the timed batch, and compare with the PyTorch ``reference``: the file and the largest errors."""
        import numpy as np
        import torch

        from export.onnx_export import export_dense
        from graph_passes.onnx_io.files import read_model, save_model
        from patchslim.ort_runner import OrtRunner
        from patchslim.runner import infer_in_batches

        path = self.folder / f"{name}.onnx"
        if (record := path.with_suffix(".json")).exists():
            found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            return found
        self.bench.reporter.say(f"exporting {type(module).__name__} to {path.name}")
        # onnx-graphsurgeon logs to stdout, which is kept for the results
        with contextlib.redirect_stdout(sys.stderr), atomic_path(path) as part:
            export_dense(module.eval(), tuple(self.bench.loaded.data_config["input_size"]), part)
            model = read_model(part)
            model = change(model) if change else model
            fix_batch(model, self.options.batch)
            save_model(model, part)
        pixels = self.bench.pixels[:COMPARED]
        with torch.inference_mode():
            wanted = reference(pixels).numpy()
        errors = np.abs(infer_in_batches(OrtRunner(path, threads=self.options.threads), pixels.numpy()) - wanted).max(axis=1)
        if (errors > TOLERANCE).mean() > FLIPS:
            raise RuntimeError(f"{name}: the exported {type(module).__name__} differs from PyTorch by {np.median(errors)}")
        apart = int((errors > TOLERANCE).sum())
        made = {"file": path.name, "median_error": float(np.median(errors)), "error": float(errors.max()), "apart": apart}
        with atomic_path(record) as part:
            part.write_text(json.dumps(made), encoding="utf-8")
        return made


def fix_batch(model: Any, batch: int) -> None:
    """Give an exported model a fixed batch, in place, so that ONNX Runtime folds every shape in advance, whoever made it."""
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]


def timed(paths: list[Path], pixels: Any, options: Options, report: Callable[[int, int], None]) -> NDArray[Any]:
    """Seconds (2, rounds, models) of one batch: CPU time of the calling thread, and wall time.

    Each visit runs a model twice and times the second run, so that its weights are as near as they are to one that serves.
    With one thread ONNX Runtime's only thread is the calling one; its clock stands still while others have its core.
    """
    import numpy as np

    from patchslim.ort_runner import OrtModel

    models = [OrtModel(path, threads=options.threads) for path in paths]
    feeds = [{model.inputs[0].name: pixels} for model in models]
    shuffle = np.random.default_rng(0)
    times = np.empty((2, options.rounds, len(paths)))
    for number in range(-_WARMUP, options.rounds):
        for index in shuffle.permutation(len(paths)):
            models[index].run(feeds[index])
            wall, cpu = time.perf_counter(), time.thread_time()
            models[index].run(feeds[index])
            taken = time.thread_time() - cpu, time.perf_counter() - wall
            if number >= 0:
                times[:, number, index] = taken
        report(number + _WARMUP + 1, options.rounds + _WARMUP)
    return times


def measure(options: Options) -> dict[str, Any] | None:
    """Export, evaluate, time and write ``--output``; None after ``--prepare``. Raises ``PatchslimError``."""
    options.check()
    bench = Bench(options.of_tables())
    with tempfile.TemporaryDirectory(prefix="patchslim-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        workshop = Workshop(options, bench, folder)
        rows = [workshop.row(case) for case in cases(options)]
        if options.prepare:
            return None
        add_times(rows, folder, bench, options)
    import onnxruntime

    machine = tables.machine(options.of_tables()) | {"onnxruntime": onnxruntime.__version__}
    result = {"name": options.name, "command": options.command(), "machine": machine, **workshop.described}
    result["default"] = {"score": options.score, "fit": options.fit, "mode": "compact"}
    clock = "cpu" if options.threads == 1 else "wall"
    result["timing"] = {"batch": options.batch, "threads": options.threads, "rounds": options.rounds, "clock": clock}
    result |= {"rows": rows, "summary": summarised(rows)}
    write(options.output, result)
    return result


def add_times(rows: list[dict[str, Any]], folder: Path, bench: Bench, options: Options) -> None:
    """Time every export, and put into each row the times of its fastest."""
    import numpy as np

    from patchslim.timing import level_rounds

    exports = [(row, name) for row in rows for name in row.get("exports", {})]
    pixels = bench.pixels[[index % len(bench.pixels) for index in range(options.batch)]].numpy()
    with bench.reporter.bar("timing", unit="rounds") as update:
        paths = [folder / row["exports"][name]["file"] for row, name in exports]
        times = timed(paths, pixels, options, update)
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
            row |= {name: fastest[name] for name in ("latency_ms", "latency_p25", "latency_p75", "wall_ms", "ratio_to_dense")}


def main(options: Options) -> int:
    """Measure, or show what was measured; the results as Markdown on stdout."""
    results = [read(path) for path in options.show]
    if not results:
        measured = measure(options)
        if measured is None:
            return 0
        results = [measured]
    print("\n".join(markdown(result) for result in results))
    if options.figure:
        draw(results[0], options.figure)
    return 0


if __name__ == "__main__":
    description = "Accuracy at equal measured latency in ONNX Runtime: ours against ToMe and EViT."
    sys.exit(run_command(Options, main, prog="benchmarks.accuracy.latency", description=description))
