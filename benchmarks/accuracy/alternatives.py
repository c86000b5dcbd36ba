"""``python -m benchmarks.accuracy.alternatives``: other ways to spend the same MACs, beside our default plan.

    python -m benchmarks.accuracy.alternatives --name digits --output benchmarks/accuracy/results/digits-alternatives.json

At every budget, on the same held-out images, all but the first and the last fitted in closed form on the same calibration
images, none trained with labels:

- resolution, blocks-N, DiffRate, radial: as ``benchmarks.accuracy.other_plans`` says;
- blocks-auto: the default plan; ramp: tokens go in every block (``--merge-blocks ramp``);
- distilled: the default plan, then ``--fit distill`` for ``--distill-steps``; 0 leaves it out.

Rows are written as they are done, and a second call of the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.other_plans import at_lower_resolution, other_plan
from benchmarks.accuracy.rows import BLOCKS, Case, SubjectOptions, TableOptions, is_other
from benchmarks.accuracy.tables import identity, machine
from patchslim.cli import run_command
from patchslim.errors import BudgetUnreachable, InputRejected, UsageError
from patchslim.records import atomic_path
from slimming.search.distillation import Distillation, TrainingPrecision

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.accuracy.bench import Bench, CalibrationDraw
    from slimming.api import FoundPlan
    from slimming.run import SlimmingOptions


@dataclasses.dataclass(frozen=True)
class AlternativeOptions(SubjectOptions):
    """Options of ``benchmarks.accuracy.alternatives``."""

    merge_blocks: tuple[int, ...] = (2, 3)
    """Numbers of merging blocks to search."""
    distill_steps: int = 0
    """Steps of ``--fit distill``; 0 leaves it out."""
    distill_budgets: tuple[float, ...] = (0.45,)
    """Budgets to distil at."""
    distill_lr: float = Distillation.lr
    """Peak learning rate of distilling."""
    distill_precision: TrainingPrecision = "no"
    """Mixed precision of distilling."""
    rows: tuple[str, ...] = ()
    """Of the rows only these, as ramp or distilled, beside dense; by default all."""
    seed: int = 0
    """Draws the calibration images."""
    output: Path = Path("alternatives.json")
    """The JSON file of results."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if self.distill_steps < 0 or not self.merge_blocks or min(self.merge_blocks) < 1:
            raise UsageError("--distill-steps must not be negative, and --merge-blocks has numbers from 1")
        if unknown := [name for name in self.rows if name not in ("ramp", "distilled") and not is_other(name)]:
            raise UsageError(
                f"--rows {unknown[0]}: must be ramp, distilled, resolution, radial, DiffRate, {BLOCKS}auto or {BLOCKS}N"
            )
        if "distilled" in self.rows and not self.distill_steps:
            raise UsageError("--rows distilled goes with --distill-steps")
        self.of_tables().check()

    def of_tables(self) -> TableOptions:
        """The options of the accuracy tables that load the same model, images and plans."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(SubjectOptions)}
        return TableOptions(**shared, seeds=(self.seed,), output=self.output)


Row = dict[str, Any]
#: What makes a row: the module to measure, and what it says of itself.
Maker = Callable[[], tuple["nn.Module", Row]]


class Alternatives:
    """One run: the bench, one draw of calibration images, and the rows so far."""

    def __init__(self, options: AlternativeOptions) -> None:
        from benchmarks.accuracy.bench import Bench, CalibrationDraw

        options.check()
        self.options = options
        self.bench: Bench = Bench(options.of_tables())
        self.draw: CalibrationDraw = CalibrationDraw(self.bench, "compact", options.seed)
        self.rows: dict[str, Row] = {}
        if options.output.exists():
            there = read(options.output)
            if identity(there) != json.loads(json.dumps(identity(self.bench.described()))):
                raise InputRejected(f"{options.output}: holds results of another model or other images: take another --output")
            self.rows = {row["row"]: row for row in there["rows"]}

    def measure(self) -> dict[str, Any]:
        """Every row that is not there yet; the results."""
        self.add("dense", lambda: (self.bench.model, {"macs": self.bench.dense_macs}))
        for budget in self.bench.options.budgets:
            for name, make in self.makers(budget).items():
                if self.options.rows and name not in self.options.rows:
                    continue
                self.add(f"{name} {budget:.0%}", make, budget=budget)
        return self.write()

    def makers(self, budget: float) -> dict[str, Maker]:
        """The rows of a budget by name."""
        makers: dict[str, Maker] = {
            "resolution": lambda: at_lower_resolution(self.bench.model, self.bench.options.model, budget),
            "ramp": lambda: self.slim(self.found(budget, merge_blocks="ramp")),
        }
        for name in (*(f"{BLOCKS}{blocks}" for blocks in ("auto", *self.options.merge_blocks)), "DiffRate", "radial"):
            makers[name] = lambda name=name: self.slim(self.other(name, budget))  # type: ignore[misc]
        if self.options.distill_steps and budget in self.options.distill_budgets:
            makers["distilled"] = lambda: self.slim(self.distilled(budget))
        return makers

    def add(self, name: str, make: Maker, **facts: Any) -> None:
        """Measure a row and write it, unless it is there."""
        if name in self.rows:
            return
        start = time.process_time()
        try:
            module, more = make()
        except BudgetUnreachable as error:
            self.rows[name] = {"row": name, **facts, "refused": str(error)}
        else:
            made = round(time.process_time() - start, 1)
            reduction = round(1 - more["macs"] / self.bench.dense_macs, 5)
            measured = self.bench.accuracy_of(module.eval(), name)
            self.rows[name] = {"row": name, **facts, **more, "reduction": reduction, **measured, "made_cpu_s": made}
            self.bench.reporter.say(f"{name}: {measured['top1']:.2%}, KL {measured['kl']:.4f}, -{reduction:.1%}")
        self.write()

    def found(self, budget: float, **more: Any) -> FoundPlan:
        """Our plan at a budget, with its fit."""
        options = dataclasses.replace(self.ours(budget), **more)
        options.check()
        return self.draw.finder(options).find_plan(options.request())

    def distilled(self, budget: float) -> FoundPlan:
        """The default plan at a budget, distilled; an interrupted run goes on from a folder beside the results."""
        given = self.options
        options = dataclasses.replace(
            self.ours(budget),
            merge_blocks="auto",
            fit="distill",
            distill_steps=given.distill_steps,
            distill_lr=given.distill_lr,
            finetune_precision=given.distill_precision,
        )
        options.check()
        folder = self.options.output.with_suffix(".distill.part")
        found = self.draw.finder(options).find_plan(options.request(), checkpoint=folder)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    def ours(self, budget: float) -> SlimmingOptions:
        """The options of our default plan at a budget."""
        return self.bench.options.slimming(Case("auto", budget, "closed-form", "compact", self.options.seed))

    def other(self, method: str, budget: float) -> FoundPlan:
        """Another method's plan at a budget, with its fit."""
        options = self.ours(budget)
        return other_plan(method, self.draw.finder(options), options)

    def slim(self, found: FoundPlan) -> tuple[nn.Module, Row]:
        """A plan's module, and what its row says."""
        row: Row = {"macs": found.plan.macs(), "counts": found.plan.counts}
        if found.plan.origin.merge_blocks is not None:
            row["merge_blocks"] = found.plan.origin.merge_blocks
        return self.draw.module_of(found), row | ({} if found.finetune is None else {"distilled": found.finetune})

    def write(self) -> dict[str, Any]:
        """Write the results whole, one row a line."""
        result = {
            "name": self.options.name,
            "command": self.options.command_of("benchmarks.accuracy.alternatives", ()),
            "machine": machine(self.bench.options),
            **self.bench.described(),
            "rows": list(self.rows.values()),
        }
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items() if name != "rows"]
        rows = ",\n  ".join(json.dumps(row) for row in self.rows.values())
        with atomic_path(self.options.output) as part:
            part.write_text("{\n" + ",\n".join(lines) + f',\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")
        return result


def read(path: Path) -> dict[str, Any]:
    """A results file of this command; raises ``InputRejected``."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(row["row"], str) for row in found["rows"]):
            raise ValueError("a row has no name")
        identity(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputRejected(f"{path}: not a results file of benchmarks.accuracy.alternatives: {error}") from error
    return found


def main(options: AlternativeOptions) -> int:
    """Measure, and print a line per row."""
    for row in Alternatives(options).measure()["rows"]:
        print(f"{row['row']:20} " + (row.get("refused") or f"{row['reduction']:7.1%} {row['top1']:8.2%} KL {row['kl']:.4f}"))
    return 0


if __name__ == "__main__":
    description = "Other ways to spend the same MACs: lower resolution, few merging blocks, DiffRate's counts, the centre."
    sys.exit(run_command(AlternativeOptions, main, prog="benchmarks.accuracy.alternatives", description=description))
