"""``python -m slimming.run -o plan.json``: find which tokens each block of a ViT can do without."""

from __future__ import annotations

if __name__ == "__main__":
    from patchslim.interrupts import end_when_interrupted

    end_when_interrupted()

import dataclasses
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from patchslim.choices import Layout
from patchslim.cli import run_command
from patchslim.errors import EXIT_DONE, UsageError
from patchslim.plan import FILE_NAME, SlimPlan
from slimming.inputs import check_file
from slimming.models.abilities import check_abilities
from slimming.onnx_models.abilities import GRAPH_REFUSALS
from slimming.options import DEFAULT_MARGIN, ModelOptions
from slimming.search.budget import LATENCY

if TYPE_CHECKING:
    from slimming.pipeline import SavedPlan

#: Bytes of a plan's name: with the endings of what lies beside it, it must stay below the 255 of most file systems.
MAX_NAME = 180
#: Held-out images that a sweep is measured on.
SWEEP_IMAGES = 1000

EXAMPLES = (
    "--model vit_ti --macs-reduction 0.45 --sweep 0.3,0.45,0.6 -o plan.json",
    "--onnx dense.onnx --mean 0.5 --std 0.5 --data images/ -o plan.json",
)


@dataclass(frozen=True)
class GraphGroup:
    """A plan for an ONNX file, where there is no timm model."""

    onnx: Path | None = None
    """Instead of --model and --weights: an ONNX file, whoever exported it. Needs --mean and --std; fits nothing."""


@dataclass(frozen=True)
class MeasureGroup:
    """What the plan is measured on, and what else is searched for the page."""

    sweep: str | None = None
    """Also search at these MAC reductions, as 0.2,0.3,0.4, and draw accuracy against MACs on the page."""
    eval_images: int | None = None
    """Held-out images to measure the plan and the sweep on. Default: 1,000 for a sweep, none without."""
    max_top1_drop: float | None = None
    """Points of top-1 that the plan of --macs-reduction max may lose on the calibration images. Default: 0.2."""


@dataclass(frozen=True)
class OutputGroup:
    """What is written and printed."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("plan.json")
    """Where to write the plan; its page, and its weights where they were fitted, go beside it."""
    layout: Layout = "split"
    """How the cut projections will be laid, for the MAC count: split (ONNX Runtime) or packed (TensorRT)."""
    json: bool = False
    """Print one JSON object on stdout instead of a table."""


@dataclass(frozen=True)
class SlimmingOptions(OutputGroup, MeasureGroup, GraphGroup, ModelOptions):
    """Find a slim plan for a Vision Transformer: which tokens each block keeps, from the last block down."""

    @property
    def margin(self) -> float:
        """``--max-top1-drop``, or its default."""
        return DEFAULT_MARGIN if self.max_top1_drop is None else self.max_top1_drop

    @property
    def reductions(self) -> list[float]:
        """``--sweep``, sorted; raises ``UsageError`` where it cannot be read."""
        try:
            found = sorted({float(value) for value in self.sweep.split(",")}) if self.sweep is not None else []
        except ValueError as error:
            raise UsageError(f"--sweep {self.sweep}: must be fractions with commas between") from error
        if any(not 0 <= value < 1 for value in found):
            raise UsageError(f"--sweep {self.sweep}: must be fractions from 0 to below 1")
        return found

    @property
    def measured(self) -> int:
        """How many held-out images are measured on."""
        return self.eval_images if self.eval_images is not None else SWEEP_IMAGES if self.sweep is not None else 0

    def check_output(self) -> None:
        """Raise ``UsageError``, before the search rather than after it, where the plan could not be written."""
        above = next(parent for parent in self.output.absolute().parents if parent.exists())
        if self.output.is_dir() or not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise UsageError(f"--output {self.output}: not a file that can be written")
        if self.output.suffix in (".html", ".safetensors", ".checkpoint"):
            raise UsageError(f"--output {self.output}: the plan's page and weights take that ending; name it plan.json")
        name = self.output.name
        if len(os.fsencode(name)) > MAX_NAME:
            raise UsageError(f"--output {self.output}: its name has over {MAX_NAME} bytes", next_step="name it plan.json")
        fitted = self.onnx is None and (self.fit != "none" or self.finetune_epochs > 0)
        if fitted and not re.match(FILE_NAME, name):
            wrong = f"--output {self.output}: its weights are named after it, and {name!r} has other than A-Z a-z 0-9 . _ -"
            raise UsageError(wrong, next_step="name it plan.json")

    def check_inputs(self) -> None:
        """Raise ``InputRejected`` where what the options name is not there. Quick: nothing is loaded."""
        super().check_inputs()
        if self.onnx is not None:
            check_file(self.onnx, "--onnx")

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        super().check()
        if self.onnx is not None:
            self._check_graph(self.onnx)
        assert self.reductions is not None
        if self.max_top1_drop is not None and self.budget.within is None:
            raise UsageError("--max-top1-drop goes with --macs-reduction max, or --latency-reduction max: pass one of them")
        if self.eval_images is not None and self.eval_images < 0:
            raise UsageError(f"--eval-images {self.eval_images}: must be at least 0")
        if self.budget.criterion in LATENCY and self.latency_table is None:
            raise UsageError(
                f"--{self.budget.criterion} needs --latency-table; export.run measures one, and keeps it in its bundle"
            )

    def _check_graph(self, path: Path) -> None:
        """Raise ``UsageError`` for options that contradict ``--onnx PATH``, or that no plan for an ONNX file can have."""
        for name in ("model", "weights", "model_arg", "ema"):
            if getattr(self, name) != getattr(ModelOptions, name):
                raise UsageError(f"--onnx {path} and --{name.replace('_', '-')} contradict each other: the file is the model")
        check_abilities(self.request().asks, GRAPH_REFUSALS)
        if self.finetune_epochs:
            check_abilities(["finetune"], GRAPH_REFUSALS)
        if self.device == "cuda":
            raise UsageError("--onnx runs in ONNX Runtime on the CPU: leave --device out")


def run(options: SlimmingOptions) -> int:
    """Find and save the plan; returns the exit code. Raises ``PatchslimError``."""
    options.check()
    options.check_output()
    options.check_inputs()
    from slimming.distributed import close_process_group, open_process_group
    from slimming.pipeline import PlanJob, save_plan

    job = PlanJob(
        output=options.output,
        layout=options.layout,
        onnx=options.onnx,
        reductions=tuple(options.reductions),
        measured_images=options.measured,
        draws_sweep=options.sweep is not None,
        command=shlex.join(["python", "-m", "slimming.run", *sys.argv[1:]]),
    )
    try:
        saved = save_plan(options, job, open_process_group(options.device))
    finally:
        close_process_group()
    if saved is not None:
        _print(saved, options)
    return EXIT_DONE


def summarise(plan: SlimPlan, layout: Layout) -> dict[str, object]:
    """Return tokens per block, MACs and errors of a plan, ready for JSON."""
    dense, slim = plan.dense_macs(), plan.macs(layout)
    return {
        "tokens_per_block": plan.counts,
        "merge_blocks": plan.origin.merge_blocks,
        "walk": plan.origin.walk and plan.origin.walk.model_dump(mode="json"),
        "macs": {"dense": dense, "slim": slim, "reduction": 1 - slim / dense, "layout": layout},
        "tolerance": plan.origin.tolerance,
        "errors": plan.origin.errors,
    }


def _print(saved: SavedPlan, options: SlimmingOptions) -> None:
    """Print the plan on stdout: one JSON object, or a table."""
    plan = saved.plan
    if options.json:
        summary = summarise(plan, options.layout) | {"plan": str(saved.path), "page": str(saved.page)}
        summary |= {"weights": str(saved.weights) if saved.weights else None}
        if saved.sweep is not None:
            points = [dataclasses.asdict(point) for point in saved.sweep.points]
            summary |= {"dense_top1": saved.sweep.dense_top1, "sweep": points}
        print(json.dumps(summary))
        return
    from patchslim.console import Console
    from slimming.report.tables import plan_table, sweep_table, walk_table

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(plan_table(plan))
    if plan.origin.walk is not None:
        console.print(walk_table(plan.origin.walk, plan.dense_macs()))
    if saved.sweep is not None and options.sweep is not None:
        console.print(sweep_table(saved.sweep.points, saved.sweep.dense_top1))
    dense, slim = plan.dense_macs(), plan.macs(options.layout)
    print(f"{saved.path}: {slim / 1e9:.3f} of {dense / 1e9:.3f} GMACs, {1 - slim / dense:.1%} removed")
    if plan.origin.merge_blocks is not None:
        print(f"tokens go {plan.origin.merge_blocks}")
    for what, path in (("weights", saved.weights), ("page", saved.page)):
        if path is not None:
            print(f"{what}: {path}")


def main(prog: str = "python -m slimming.run") -> int:
    """The command line's entry point, called ``prog`` in its messages; returns the exit code."""
    return run_command(SlimmingOptions, run, prog=prog, description=SlimmingOptions.__doc__ or "", examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
