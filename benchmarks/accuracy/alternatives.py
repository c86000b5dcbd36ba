"""``python -m benchmarks.accuracy.alternatives``: other ways to spend the same MACs, beside our default plan.

    python -m benchmarks.accuracy.alternatives --name digits --output benchmarks/accuracy/results/digits-alternatives.json

At every budget, on the same held-out images, all but the first and the last fitted in closed form on the same calibration
images, none trained with labels:

- resolution: the same weights on smaller images, positions resampled, at the side whose cost is nearest to the budget;
- ramp: the default plan; blocks-N: tokens go in N blocks that are searched (``--merge-blocks N``);
- DiffRate: the counts that Chen et al. (ICCV 2023, 2305.17997) publish for a DeiT-Ti of 0.7 GFLOPs, drawn out or in to the
  budget and over other depths, our merging;
- radial: the default plan's counts, of which the patches nearest to the centre are kept and the others dropped;
- distilled: the default plan, then ``--fit distill`` for ``--distill-steps``; 0 leaves it out.

Rows are written as they are done, and a second call of the same command goes on from there.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.rows import Case, SubjectOptions, TableOptions
from benchmarks.accuracy.tables import identity, machine
from patchslim.cli import run_command
from patchslim.errors import BudgetUnreachable, InputRejected, UsageError
from patchslim.records import atomic_path

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.accuracy.bench import Bench, CalibrationDraw
    from slimming.api import FoundPlan

#: Tokens behind the blocks of a DeiT-Ti by DiffRate at 0.7 GFLOPs (its repository's compression_rate.json), the last without
#: what no head reads.
DIFFRATE = (197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49)
_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class AlternativeOptions(SubjectOptions):
    """Options of ``benchmarks.accuracy.alternatives``."""

    merge_blocks: tuple[int, ...] = (2, 3)
    """Numbers of merging blocks to search."""
    distill_steps: int = 0
    """Steps of ``--fit distill``; 0 leaves it out."""
    distill_budgets: tuple[float, ...] = (0.45,)
    """Budgets to distil at."""
    seed: int = 0
    """Draws the calibration images."""
    output: Path = Path("alternatives.json")
    """The JSON file of results."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if self.distill_steps < 0 or not self.merge_blocks or min(self.merge_blocks) < 1:
            raise UsageError("--distill-steps must not be negative, and --merge-blocks has numbers from 1")
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
                self.add(f"{name} {budget:.0%}", make, budget=budget)
        return self.write()

    def makers(self, budget: float) -> dict[str, Maker]:
        """The rows of a budget by name."""
        makers: dict[str, Maker] = {
            "resolution": lambda: self.resolution(budget),
            "ramp": lambda: self.slim(self.found(budget, merge_blocks="ramp")),
        }
        for blocks in self.options.merge_blocks:
            makers[f"blocks-{blocks}"] = lambda blocks=blocks: self.slim(self.found(budget, merge_blocks=str(blocks)))  # type: ignore[misc]
        makers["DiffRate"] = lambda: self.slim(self.diffrate(budget))
        makers["radial"] = lambda: self.slim(self.radial(budget))
        if self.options.distill_steps and budget in self.options.distill_budgets:
            steps = self.options.distill_steps
            makers["distilled"] = lambda: self.slim(self.found(budget, merge_blocks="ramp", fit="distill", distill_steps=steps))
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
        options = self.bench.options.slimming(Case("auto", budget, "closed-form", "compact", self.options.seed))
        options = dataclasses.replace(options, **more)
        options.check()
        return self.draw.finder(options).find_plan(options.request())

    def slim(self, found: FoundPlan) -> tuple[nn.Module, Row]:
        """A plan's module, and what its row says."""
        row: Row = {"macs": found.plan.macs(), "counts": found.plan.counts}
        if found.plan.origin.merge_blocks is not None:
            row["merge_blocks"] = found.plan.origin.merge_blocks
        return self.draw.module_of(found), row | ({} if found.finetune is None else {"distilled": found.finetune})

    def diffrate(self, budget: float) -> FoundPlan:
        """DiffRate's counts at a budget, merged as we do."""
        reader = self.bench.reader
        depth, tokens, limit = len(reader.blocks), reader.tokens, (1 - budget) * self.bench.dense_macs
        options = self.bench.options.slimming(Case("auto", budget, "closed-form", "compact", self.options.seed))
        finder = self.draw.finder(options)
        from slimming.search.costs import MacsCost

        cost = MacsCost(tokens, depth, reader.geometry(), merged=True)
        for step in range(_STEPS):
            counts = [*diffrate_counts(tokens, depth, 2 * step / _STEPS), len(reader.head.tokens)]
            if cost.of(counts) <= limit:
                asked = dataclasses.replace(options, macs_reduction=None, tokens=",".join(map(str, counts)))
                return finder.find_plan(asked.request())
        raise BudgetUnreachable(f"DiffRate's counts cannot remove {budget:.0%}")

    def radial(self, budget: float) -> FoundPlan:
        """The default plan's counts with the patches nearest to the centre; what is dropped is dropped."""
        from slimming.api import FoundPlan, make_plan
        from slimming.fitting.closed_form import compensate

        bench, ramp = self.bench, self.found(budget, merge_blocks="ramp", fit="none").plan
        rows, columns = ramp.grid
        away = {
            ramp.prefix_tokens + row * columns + column: (row - (rows - 1) / 2) ** 2 + (column - (columns - 1) / 2) ** 2
            for row in range(rows)
            for column in range(columns)
        }
        order = [*range(ramp.prefix_tokens), *sorted(away, key=lambda token: away[token])]
        kept = [sorted(order[:count]) for count in ramp.counts[:-1]] + [ramp.kept[-1]]
        plan = make_plan(bench.model, ramp.model, kept)
        model = copy.deepcopy(bench.model)
        options = bench.options.slimming(Case("auto", budget, "closed-form", "compact", self.options.seed))
        compensate(model, self.draw.finder(options).features, plan)
        return FoundPlan(plan, model, "closed-form")

    def resolution(self, budget: float) -> tuple[nn.Module, Row]:
        """The dense model on smaller images, at the side whose cost is nearest to the budget."""
        from benchmarks.accuracy.resolution import at_resolution, macs_by_side

        costs = macs_by_side(self.bench.model, self.bench.options.model)
        side = min(costs, key=lambda side: abs(costs[side] - (1 - budget) * self.bench.dense_macs))
        return at_resolution(self.bench.model, side), {"macs": costs[side], "side": side}

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


def diffrate_counts(tokens: int, depth: int, stretch: float) -> list[int]:
    """DiffRate's counts for the blocks but the last, at the same depths; ``stretch`` 1 drops as much as its own."""
    found = []
    for block in range(depth - 1):
        place = (block + 1) / (depth - 1) * len(DIFFRATE) - 1
        low = min(max(int(place), 0), len(DIFFRATE) - 2)
        kept = DIFFRATE[low] + (DIFFRATE[low + 1] - DIFFRATE[low]) * (place - low)
        found.append(max(2, min(tokens, round(tokens * (1 - stretch * (1 - kept / DIFFRATE[0]))))))
    return [min(found[: block + 1]) for block in range(len(found))]


def main(options: AlternativeOptions) -> int:
    """Measure, and print a line per row."""
    for row in Alternatives(options).measure()["rows"]:
        print(f"{row['row']:20} " + (row.get("refused") or f"{row['reduction']:7.1%} {row['top1']:8.2%} KL {row['kl']:.4f}"))
    return 0


if __name__ == "__main__":
    description = "Other ways to spend the same MACs: lower resolution, few merging blocks, DiffRate's counts, the centre."
    sys.exit(run_command(AlternativeOptions, main, prog="benchmarks.accuracy.alternatives", description=description))
