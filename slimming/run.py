"""``python -m slimming.run -o plan.json``: find which tokens each block of a ViT can do without."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from patchslim.choices import Layout
from patchslim.cli import run_command
from patchslim.errors import EXIT_DONE, UsageError
from patchslim.plan import SlimPlan
from slimming.options import ModelOptions
from slimming.search.budget import LATENCY

if TYPE_CHECKING:
    from slimming.distributed import ProcessGroup
    from slimming.report.page import SweepPoint
    from slimming.session import SlimmingSession

#: Held-out images that a sweep is measured on.
SWEEP_IMAGES = 1000
PAGE_IMAGES = 4

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

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        super().check()
        if self.onnx is not None:
            from slimming.onnx_models.session import check_options

            check_options(self, self.onnx)
        assert self.reductions is not None
        if self.eval_images is not None and self.eval_images < 0:
            raise UsageError(f"--eval-images {self.eval_images}: must be at least 0")
        if self.budget.criterion in LATENCY and self.latency_table is None:
            raise UsageError(
                f"--{self.budget.criterion} needs --latency-table; export.run measures one, and keeps it in its bundle"
            )


def run(options: SlimmingOptions) -> int:
    """Find and save the plan; returns the exit code. Raises ``PatchslimError``."""
    options.check()
    options.check_output()
    if options.onnx is not None:
        options = dataclasses.replace(options, fit="none")
    from slimming.distributed import close_process_group, open_process_group

    process_group = open_process_group(options.device)
    try:
        return _run(options, process_group)
    finally:
        close_process_group()


def _run(options: SlimmingOptions, process_group: ProcessGroup) -> int:
    from patchslim.progress import Reporter
    from slimming.data.source import evaluation_set
    from slimming.fitting.fitted_weights import save_fitted
    from slimming.onnx_models.session import open_graph_finder
    from slimming.session import open_finder, open_session, search

    reporter = Reporter(quiet=not process_group.is_primary)
    images = evaluation_set(options.data, options.measured) if options.measured else None
    session = open_session(options, images, process_group) if options.onnx is None else _open_graph(options, images, reporter)
    cost = _latency(options, session)
    reporter.say(
        f"{options.onnx or options.model}: searching on {len(session.calibration)} images of {session.calibration.address}"
    )
    checkpoint = options.output.with_suffix(".checkpoint")
    with reporter.stages() as progress:
        opened = open_finder if options.onnx is None else open_graph_finder
        finder: Any = opened(options, session, progress, process_group)
        try:
            found = search(options, session, options.layout, progress, cost=cost, finder=finder, checkpoint=checkpoint)
            sweep, dense = _sweep(options, session, finder, found, images, process_group, progress)
        finally:
            finder.close()
    if not process_group.is_primary:
        process_group.barrier()
        return EXIT_DONE
    if options.fit != found.fit:
        reporter.say(f"the blocks of {options.model} end in norms, so they cannot be refitted in closed form: --fit none")
    try:
        plan = save_fitted(found.plan, found.model, options.output, found.fit, found.finetune)
        page = _write_page(options, session, plan, sweep, dense)
    except OSError as error:
        raise UsageError(f"--output {options.output}: cannot be written: {error.strerror or error}") from error
    shutil.rmtree(checkpoint, ignore_errors=True)
    summary = summarise(plan, options.layout) | {"plan": str(options.output), "page": str(page)}
    summary |= {"weights": str(options.output.with_name(plan.weights.file)) if plan.weights else None}
    if images is not None:
        summary |= {"dense_top1": dense, "sweep": [dataclasses.asdict(point) for point in sweep]}
    if options.json:
        print(json.dumps(summary))
    else:
        _print(plan, options, summary)
    process_group.barrier()
    return EXIT_DONE


def _open_graph(options: SlimmingOptions, images: Any, reporter: Any) -> SlimmingSession:
    from slimming.onnx_models.session import described, open_graph

    assert options.onnx is not None
    session = open_graph(options, options.onnx, images)
    reporter.say(f"{options.onnx}: {described(session.loaded.data_config)}")
    return session


def _latency(options: SlimmingOptions, session: SlimmingSession) -> Any:
    """The latency table that a latency budget is solved on, checked against the model; None for the other budgets."""
    from patchslim.latency_table import load_table
    from slimming.api import dense_plan

    if options.latency_table is None or options.budget.criterion not in LATENCY:
        return None
    table = load_table(options.latency_table)
    plan = dense_plan(session.loaded.module, session.loaded.architecture).model_copy(update={"mode": options.mode})
    table.ensure_fits(plan, options.layout, options.merges(fixed_head=bool(plan.head_tokens)))
    return table


def _sweep(
    options: SlimmingOptions,
    session: SlimmingSession,
    finder: Any,
    found: Any,
    images: Any,
    process_group: ProcessGroup,
    progress: Any,
) -> tuple[list[SweepPoint], float | None]:
    """The plan itself and every reduction of the sweep, measured; and the dense model's top-1, where there are images."""
    from patchslim.errors import BudgetUnreachable
    from slimming.models.slim_vit import SlimViT
    from slimming.onnx_models.session import slimmed
    from slimming.report.accuracy import evaluate
    from slimming.report.page import SweepPoint
    from slimming.search.budget import Budget

    every, score = [found], found.plan.origin.score
    for reduction in options.reductions:
        try:
            budget = Budget("macs-reduction", reduction, snap=options.snap)
            every.append(finder.find_plan(budget, score=score, fit=options.fit, layout=options.layout, summary=options.summary))
        except BudgetUnreachable:
            continue
    if images is None:
        return [], None
    original = session.loaded.module
    models = [original]
    for each in every:
        if options.onnx is not None:
            models.append(slimmed(session, each.plan, options.layout))
        else:
            models.append(SlimViT(each.model, each.plan).to(next(original.parameters()).device).eval())
    dense, *each_accuracy = evaluate(models, images, session.transform, process_group=process_group, progress=progress)
    labelled = bool(images.labels)
    points = [
        SweepPoint(
            reduction=1 - one.plan.macs(options.layout) / one.plan.dense_macs(),
            macs=one.plan.macs(options.layout),
            counts=one.plan.counts,
            top1=accuracy.top1 if labelled else None,
            agreement=accuracy.agreement,
            errors=one.plan.origin.errors,
        )
        for one, accuracy in zip(every, each_accuracy, strict=True)
    ]
    return points, dense.top1 if labelled else None


def _write_page(
    options: SlimmingOptions, session: SlimmingSession, plan: SlimPlan, sweep: list[SweepPoint], dense: float | None
) -> Path:
    import shlex

    import numpy as np

    from slimming.data.source import load_tensors
    from slimming.report.page import write_page

    config = session.loaded.data_config
    few = dataclasses.replace(
        session.calibration, indices=session.calibration.indices[:: max(1, len(session.calibration) // 4)]
    )
    batch, _ = next(load_tensors(dataclasses.replace(few, indices=few.indices[:PAGE_IMAGES]), session.transform, PAGE_IMAGES))
    pixels = batch.numpy().transpose(0, 2, 3, 1) * np.array(config["std"]) + np.array(config["mean"])
    images = list((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    page = options.output.with_suffix(".html")
    facts = {"weights": session.loaded.weights}
    if plan.weights is not None:
        facts["fitted"] = plan.weights.fit
        if plan.weights.finetune is not None:
            facts["fine-tuned"] = f"{plan.weights.finetune.get('epochs')} epochs"
    write_page(
        page,
        plan=plan,
        layout=options.layout,
        errors=plan.origin.errors,
        images=images,
        sweep=sweep if options.sweep is not None else sweep[:1],
        dense_top1=dense,
        command=shlex.join(["python", "-m", "slimming.run", *sys.argv[1:]]),
        facts=facts,
    )
    return page


def summarise(plan: SlimPlan, layout: Layout) -> dict[str, object]:
    """Tokens per block, MACs and errors of a plan."""
    dense, slim = plan.dense_macs(), plan.macs(layout)
    return {
        "tokens_per_block": plan.counts,
        "macs": {"dense": dense, "slim": slim, "reduction": 1 - slim / dense, "layout": layout},
        "tolerance": plan.origin.tolerance,
        "errors": plan.origin.errors,
    }


def _print(plan: SlimPlan, options: SlimmingOptions, summary: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("block", "tokens kept", "E above the cut", title=f"{plan.model}, {plan.mode}, of {plan.tokens} tokens")
    for block, (count, error) in enumerate(zip(plan.counts, plan.origin.errors, strict=True), start=1):
        table.add_row(str(block), str(count), f"{error:.2e}" if error else "exact")
    Console().print(table)
    dense, slim = plan.dense_macs(), plan.macs(options.layout)
    print(f"{options.output}: {slim / 1e9:.3f} of {dense / 1e9:.3f} GMACs, {1 - slim / dense:.1%} removed")
    for what in ("weights", "page"):
        if summary[what]:
            print(f"{what}: {summary[what]}")


def main(prog: str = "python -m slimming.run") -> int:
    """The command line's entry point, called ``prog`` in its messages; returns the exit code."""
    return run_command(SlimmingOptions, run, prog=prog, description=SlimmingOptions.__doc__ or "", examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
