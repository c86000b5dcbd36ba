"""From options to a plan on disk, with its fitted weights, its page and its sweep."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchslim.choices import Layout
from patchslim.errors import UsageError
from patchslim.latency_table import LatencyTable, load_table
from patchslim.plan import SlimPlan
from patchslim.progress import Reporter
from slimming.api import dense_plan_of
from slimming.data.source import load_tensors
from slimming.distributed import ProcessGroup
from slimming.fitting.fitted_weights import save_fitted
from slimming.models.vit_reader import LoadedVit
from slimming.options import ModelOptions
from slimming.report.page import PlanPage, write_page
from slimming.report.sweep import Sweep, measure_plans, plans_at
from slimming.search.budget import LATENCY
from slimming.session import (
    SlimmingSession,
    class_names,
    evaluation_images,
    open_finder,
    open_graph_session,
    open_session,
    search,
    training_images,
)

#: Calibration images that are shown on a plan's page.
PAGE_IMAGES = 4


@dataclass(frozen=True)
class PlanJob:
    """What is made of a model's options: where the plan goes, and what is measured beside it."""

    output: Path  # the plan; its page and its weights go beside it
    layout: Layout
    onnx: Path | None  # the model as an ONNX file, in place of the one that the options name
    reductions: tuple[float, ...]  # MAC reductions that are searched as well, fractions
    measured_images: int  # held-out images that plans are measured on; 0: none
    draws_sweep: bool  # whether the page shows the sweep, or the plan's own point alone
    command: str  # what made the plan, for its page


@dataclass(frozen=True)
class SavedPlan:
    """A plan as it was written, and what was measured of it (None where nothing was)."""

    plan: SlimPlan
    path: Path
    page: Path
    weights: Path | None
    sweep: Sweep | None


def save_plan(options: ModelOptions, job: PlanJob, process_group: ProcessGroup) -> SavedPlan | None:
    """Search the plan that the options ask for, fit and measure it, and write it with its page and weights.

    Every process of the group calls it; the primary one writes and returns what it wrote, the others return None. Raises
    ``PatchslimError`` with the next step in its message.
    """
    reporter = Reporter(quiet=not process_group.is_primary)
    images = None
    if job.measured_images:
        classes = class_names(options, reporter.say, graph=job.onnx is not None)
        images = evaluation_images(options, job.measured_images, classes)
    session: SlimmingSession[LoadedVit]
    if job.onnx is not None:
        graph = open_graph_session(options, job.onnx, images)
        session = graph
        reporter.say(f"{job.onnx}: {graph.loaded.described()}")
    else:
        session = open_session(options, images, process_group)
    if options.finetune_epochs:
        for note in training_images(options).notes:
            reporter.say(note)
    model, reader = str(job.onnx or options.model), session.loaded.reader
    request = options.request(job.layout).for_model(fixed_head=reader.head.fixed, refusals=reader.refusals)
    cost = _latency_table(options, session, job.layout)
    reporter.say(f"{model}: searching on {len(session.calibration)} images of {session.calibration.address}")
    checkpoint = job.output.with_suffix(".checkpoint")
    with reporter.stages() as progress, open_finder(options, session, progress, process_group) as finder:
        found = search(options, session, job.layout, progress, cost=cost, finder=finder, checkpoint=checkpoint)
        plans = [found, *plans_at(finder, request, job.reductions)]
        sweep = None
        if images is not None:
            sweep = measure_plans(session, plans, job.layout, images, process_group, progress)
    if not process_group.is_primary:
        process_group.barrier()
        return None
    if found.fit_reason is not None:
        reporter.say(f"{model}: --fit {found.fit}: {found.fit_reason}")
    if found.fit == "none" and options.fit != "none":
        reporter.say(f"{model}: {reader.refusals['closed-form']}: --fit none")
    reporter.say(f"{job.output}: writing the plan and its page")
    try:
        with reporter.alive():
            plan = save_fitted(found.plan, found.model, job.output, found.fit, found.finetune)
            page = _write_page(job, session, plan, sweep or Sweep())
    except OSError as error:
        raise UsageError(f"--output {job.output}: cannot be written: {error.strerror or error}") from error
    shutil.rmtree(checkpoint, ignore_errors=True)
    process_group.barrier()
    weights = job.output.with_name(plan.weights.file) if plan.weights and plan.weights.file else None
    return SavedPlan(plan, job.output, page, weights, sweep)


def _latency_table(options: ModelOptions, session: SlimmingSession[LoadedVit], layout: Layout) -> LatencyTable | None:
    """The table that a latency budget is solved on, checked against the model; None for the other budgets."""
    if options.latency_table is None or options.budget.criterion not in LATENCY:
        return None
    table = load_table(options.latency_table)
    plan = dense_plan_of(session.loaded.reader, session.loaded.architecture).model_copy(update={"mode": options.mode})
    table.ensure_fits(plan, layout, options.merges(fixed_head=bool(plan.head_tokens)))
    return table


def _write_page(job: PlanJob, session: SlimmingSession[LoadedVit], plan: SlimPlan, sweep: Sweep) -> Path:
    config, calibration = session.loaded.data_config, session.calibration
    few = calibration.indices[:: max(1, len(calibration) // PAGE_IMAGES)][:PAGE_IMAGES]
    batch, _ = next(load_tensors(dataclasses.replace(calibration, indices=few), session.transform, PAGE_IMAGES))
    pixels = batch.numpy().transpose(0, 2, 3, 1) * np.array(config["std"]) + np.array(config["mean"])
    path = job.output.with_suffix(".html")
    facts = {"weights": session.loaded.weights}
    if plan.origin.merge_blocks is not None:
        facts["tokens go"] = plan.origin.merge_blocks
    if plan.weights is not None:
        facts["fitted"] = plan.weights.fit
        learnt = plan.weights.finetune
        if learnt is not None and plan.weights.fit == "distill":
            facts["distilled"] = f"{learnt.get('steps')} steps, no labels"
        elif learnt is not None:
            facts["fine-tuned"] = f"{learnt.get('epochs')} epochs"
    page = PlanPage(
        plan,
        job.layout,
        plan.origin.errors,
        images=list((pixels.clip(0, 1) * 255).round().astype(np.uint8)),
        sweep=sweep.points if job.draws_sweep else sweep.points[:1],
        dense_top1=sweep.dense_top1,
        command=job.command,
        facts=facts,
    )
    write_page(path, page)
    return path
