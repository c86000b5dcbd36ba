"""The door as a Python API: a plan for a model, and the weights that go with it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slimming.blockwise import BlockFitter
from slimming.budget import LATENCY, Budget, uniform_counts
from slimming.compensate import can_compensate, compensate
from slimming.costs import Cost, MacsCost, snap
from slimming.data import ImageSet, load_tensors
from slimming.door import BudgetUnreachable, UsageError
from slimming.families import ModelReader, check_supported, reader_of
from slimming.features import BATCH, DenseFeatures, Progress
from slimming.plan import Calibration, Fit, Layout, Mode, Origin, ScoreName, SlimPlan
from slimming.profile import profile_within
from slimming.scores import score_named
from slimming.search import Selection, TopDownSearch
from slimming.store import DEFAULT_BOUND, TensorStore
from slimming.world import ALONE, World, chunks


@dataclass(frozen=True)
class Found:
    """A plan, and the model to run under it: the given one, or a copy whose blocks were refitted to the cut."""

    plan: SlimPlan
    model: Any
    fit: Fit


def find(
    model: Any,
    images: ImageSet,
    *,
    name: str,
    transform: Any,
    budget: Budget | None = None,
    cost: Cost | None = None,
    score: ScoreName = "paper",
    fit: Fit = "none",
    mode: Mode = "compact",
    layout: Layout = "split",
    seed: int = 0,
    bound: int = DEFAULT_BOUND,
    world: World = ALONE,
    progress: Progress | None = None,
) -> Found:
    """Find the top-down masks of a timm ViT on calibration images, and refit its blocks to them.

    ``transform`` maps a PIL image to the model's input tensor. ``cost`` is what a latency budget is solved on; MAC budgets
    count the projections as ``layout`` lays them. ``bound`` is the number of bytes of per-image state held in memory
    before it spills to disk. Every process of ``world`` calls this with the same arguments and gets the same plan. A model whose blocks end in
    norms cannot be refitted in closed form, and is not: ``Found.fit`` says so.
    Raises ``InputRejected`` for a model or images that cannot be used, ``BudgetUnreachable``, ``UsageError``.
    """
    budget = budget or Budget()
    budget.check()
    reader = reader_of(model, name)
    if budget.criterion in LATENCY and cost is None:
        raise UsageError(f"--{budget.criterion} is solved on a measured latency table: pass --latency-table")
    if fit == "sgd" and world.size > 1:
        raise UsageError(
            "--fit sgd fits block after block in one process; across processes, use closed-form or --finetune-epochs"
        )
    if fit == "closed-form" and not can_compensate(model):
        fit = "none"
    if budget.criterion not in LATENCY:
        cost = MacsCost(reader.tokens, len(reader.blocks), reader.geometry(), mode, layout)
    assert cost is not None
    digests: list[bytes] = []
    ranking = score_named(score, seed)
    features = DenseFeatures(
        reader,
        _batches(images, transform, world, digests),
        len(images),
        mode=mode,
        magnitudes=ranking.needs_magnitude,
        store=TensorStore(bound),
        world=world,
        progress=progress,
    )
    try:
        fitter = BlockFitter(features, progress=progress) if fit == "sgd" else None
        if budget.criterion == "tolerance":
            selection = _within(TopDownSearch(features, ranking, fit=fitter), budget, score)
        else:
            counts = _counts(TopDownSearch(features, ranking), budget, cost, score)
            selection = TopDownSearch(features, ranking, fit=fitter).by_counts(counts)
        calibration = Calibration(
            data=f"{images.address} ({images.split}, {images.share})",
            images=len(images),
            fingerprint=world.same(digests, len(features.places)),
        )
        plan = _plan_of(model, name, selection, budget, score, mode, seed, calibration)
        fitted = fitter.model if fitter is not None else model
        if fit == "closed-form":
            fitted = copy.deepcopy(model)
            compensate(fitted, features, plan, progress=progress)
    finally:
        features.close()
    return Found(plan, fitted, fit)


def _within(search: TopDownSearch, budget: Budget, score: ScoreName) -> Selection:
    """The selection by tolerance; with ``snap``, the counts are rounded up, so that no error grows."""
    if score == "uniform":
        raise UsageError("--score uniform has one count for all blocks, and --tolerance one for each: pass --macs-reduction")
    selection = search.by_tolerance(budget.value)
    if budget.snap == 1:
        return selection
    counts = [len(kept) for kept in selection.kept]
    return search.by_counts(snap(counts, budget.snap, search.tokens, search.prefix, "up"), budget.value)


def _counts(search: TopDownSearch, budget: Budget, cost: Cost, score: ScoreName) -> list[int]:
    """Token counts per block that meet the budget."""
    head = len(search.head.tokens) if search.head.fixed else search.tokens - search.prefix
    if budget.criterion == "tokens":
        counts = budget.counts(search.tokens, search.depth, search.prefix)
        if search.head.fixed and counts[-1] != head:
            raise UsageError(f"--tokens: the last block keeps what the head reads, {head}, not {counts[-1]}")
        return snap(counts, budget.snap, search.tokens, search.prefix)
    limit = budget.limit(cost)
    if score == "uniform":
        found = uniform_counts(cost, limit, search.tokens, search.depth, search.prefix, head)
        if found is None:
            raise BudgetUnreachable(
                f"no uniform count is within {limit:.4g} of {cost.dense():.4g} {cost.unit}: pass another --score"
            )
        counts = found
    else:
        counts = profile_within(search, cost, limit)
    return snap(counts, budget.snap, search.tokens, search.prefix, "down")


def _batches(images: ImageSet, transform: Any, world: World, digests: list[bytes]) -> Iterator[Tensor]:
    """This process's batches of ``images``, in order; the digest of each is appended to ``digests``."""
    places = list(chunks(len(images), BATCH))
    own = [index for batch in world.own(len(places)) for index in images.indices[places[batch]]]
    if not own:
        return
    for batch, _ in load_tensors(dataclasses.replace(images, indices=own), transform, BATCH):
        digests.append(hashlib.sha256(batch.numpy().tobytes()).digest())
        yield batch


def _plan_of(
    model: Any, name: str, selection: Selection, budget: Budget, score: str, mode: Mode, seed: int, calibration: Calibration
) -> SlimPlan:
    origin = Origin(
        score=score,
        criterion=budget.criterion,
        value=float(budget.value) if budget.criterion != "tokens" else 0.0,
        tolerance=selection.tolerance,
        seed=seed,
        calibration=calibration,
        snap=budget.snap,
        errors=[float(error) for error in selection.errors],
    )
    return make_plan(model, name, selection.kept, mode=mode, origin=origin)


def make_plan(
    model: Any, name: str, kept: list[list[int]], *, mode: Mode = "compact", origin: Origin | None = None
) -> SlimPlan:
    """A ``SlimPlan`` for ``model`` from masks; raises ``pydantic.ValidationError`` when they break a rule of ``SlimPlan``."""
    reader = ModelReader(model)
    return SlimPlan(
        model=name,
        tokens=reader.tokens,
        grid=reader.grid,
        prefix_tokens=reader.prefix,
        pooling=reader.head.pooling,
        head_tokens=reader.head.tokens if reader.head.fixed else [],
        mode=mode,
        kept=kept,
        geometry=reader.geometry(),
        origin=origin or Origin(score="none", criterion="manual", value=0.0),
    )


def dense_plan(model: Any, name: str) -> SlimPlan:
    """The plan that drops nothing, not even in the last block."""
    check_supported(model, name)
    reader = ModelReader(model)
    origin = Origin(score="none", criterion="dense", value=0.0)
    return make_plan(model, name, [list(range(reader.tokens))] * len(reader.blocks), origin=origin)
