"""The door as a Python API: a plan for a model, and the weights that go with it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from patchslim.choices import Fit, Layout, Mode, ScoreName
from patchslim.errors import UsageError
from patchslim.plan import Calibration, Origin, SlimPlan
from patchslim.progress import StageProgress
from slimming.data.source import ImageSet, load_tensors
from slimming.distributed import SINGLE_PROCESS, ProcessGroup, batch_slices
from slimming.fitting.block_sgd import BlockFitter
from slimming.fitting.closed_form import can_compensate, compensate
from slimming.models.reader import ModelReader, check_supported, reader_of
from slimming.search.budget import LATENCY, Budget, check_similarity, check_summary, resolved_score
from slimming.search.costs import Cost, MacsCost
from slimming.search.features import BATCH, DenseFeatures
from slimming.search.profile import ProfileEvaluator, profile_within, snapped, uniform_within
from slimming.search.scores import score_named
from slimming.search.similarity import MergeSearch, SummarySearch, with_summary
from slimming.search.top_down import Selection, TopDownSearch
from slimming.tensor_store import DEFAULT_BOUND, TensorStore


@dataclass(frozen=True)
class FoundPlan:
    """A plan, and the model to run under it: the given one, or a copy whose blocks were refitted to the cut."""

    plan: SlimPlan
    model: Any
    fit: Fit
    finetune: dict[str, float | int | str] | None = None  # the recipe and its outcome, where there was one


class PlanFinder:
    """A timm ViT with its dense features on calibration images, on which any number of plans can be searched.

    ``transform`` maps a PIL image to the model's input tensor. ``bound`` is the number of bytes of per-image state held in
    memory before it spills to disk. Every process of a group makes one with the same arguments and finds the same plans.
    Raises ``InputRejected`` for a model or images that cannot be used.
    """

    def __init__(
        self,
        model: Any,
        images: ImageSet,
        *,
        name: str,
        transform: Any,
        mode: Mode = "compact",
        seed: int = 0,
        bound: int = DEFAULT_BOUND,
        process_group: ProcessGroup = SINGLE_PROCESS,
        progress: StageProgress | None = None,
        magnitudes: bool = True,
    ) -> None:
        self.model, self.name, self.mode, self.seed, self.process_group, self.progress = (
            model,
            name,
            mode,
            seed,
            process_group,
            progress,
        )
        self.reader = reader_of(model, name)
        digests: list[bytes] = []
        self.features = DenseFeatures(
            self.reader,
            calibration_batches(images, transform, process_group, digests),
            len(images),
            mode=mode,
            magnitudes=magnitudes,
            store=TensorStore(bound),
            process_group=process_group,
            progress=progress,
        )
        self.calibration = Calibration(
            data=f"{images.address} ({images.split}, {images.share})",
            images=len(images),
            fingerprint=process_group.digest_over_batches(digests, len(self.features.places)),
        )

    def find_plan(
        self,
        budget: Budget | None = None,
        *,
        cost: Cost | None = None,
        score: ScoreName = "auto",
        fit: Fit = "none",
        layout: Layout = "split",
        summary: bool = False,
    ) -> FoundPlan:
        """Find the top-down masks that meet ``budget``, and fit the blocks to them.

        ``cost`` is what a latency budget is solved on; MAC budgets count the projections as ``layout`` lays them. A model whose
        blocks end in norms cannot be refitted in closed form, and is not: ``FoundPlan.fit`` says so. With the score
        ``similarity`` the plan merges tokens; with ``summary`` it keeps the mean of those that the score drops, which the
        budget and the fit count and scores and errors do not.
        Raises ``BudgetUnreachable``, ``UsageError``.
        """
        budget = budget or Budget()
        budget.check()
        reader = self.reader
        score = resolved_score(score, reader.head.fixed, self.mode, fit, budget, summary)
        if summary:
            check_summary(self.mode, fit)
        if score == "similarity":
            check_similarity(self.mode, fit, budget, summary=summary)
        merged = summary or score == "similarity"
        if budget.criterion not in LATENCY:
            cost = MacsCost(reader.tokens, len(reader.blocks), reader.geometry(), self.mode, layout, merged)
        elif cost is None:
            raise UsageError(f"--{budget.criterion} is solved on a measured latency table: pass --latency-table")
        if fit == "closed-form" and not can_compensate(self.model):
            fit = "none"
        fitter = BlockFitter(self.features, progress=self.progress) if fit == "sgd" else None
        selection = self._selected(budget, cost, score, summary, fitter)
        origin = Origin(
            score=score,
            criterion=budget.criterion,
            value=0.0 if budget.criterion == "tokens" else float(budget.value),
            tolerance=selection.tolerance,
            seed=self.seed,
            calibration=self.calibration,
            snap=budget.snap,
            errors=[float(error) for error in selection.errors],
        )
        plan = make_plan(
            self.model, self.name, selection.kept, mode=self.mode, merged_into=selection.merged_into, origin=origin
        )
        fitted = fitter.model if fitter is not None else self.model
        if fit == "closed-form":
            fitted = copy.deepcopy(self.model)
            compensate(fitted, self.features, plan, progress=self.progress)
        return FoundPlan(plan, fitted, fit)

    def _selected(
        self, budget: Budget, cost: Cost | None, score: ScoreName, summary: bool, fitter: BlockFitter | None
    ) -> Selection:
        """The tokens that the plan keeps, and, where it merges, what becomes of the others."""
        if score == "similarity":
            assert cost is not None
            merging = MergeSearch(self.features)
            return merging.by_counts(counts_for(merging, budget, cost, score))
        ranking = score_named(score, self.seed)
        if budget.criterion == "tolerance":
            found = within_tolerance(TopDownSearch(self.features, ranking, fit=fitter), budget, score)
            return with_summary(found, self.features.tokens) if summary else found
        assert cost is not None
        search = TopDownSearch(self.features, ranking)
        if summary:
            summarising = SummarySearch(search)
            return summarising.by_counts(counts_for(summarising, budget, cost, score))
        counts = counts_for(search, budget, cost, score)
        return TopDownSearch(self.features, ranking, fit=fitter).by_counts(counts)

    def close(self) -> None:
        """Let go of the features."""
        self.features.close()


def find_plan(
    model: Any,
    images: ImageSet,
    *,
    name: str,
    transform: Any,
    budget: Budget | None = None,
    cost: Cost | None = None,
    score: ScoreName = "auto",
    fit: Fit = "none",
    mode: Mode = "compact",
    layout: Layout = "split",
    summary: bool = False,
    seed: int = 0,
    bound: int = DEFAULT_BOUND,
    process_group: ProcessGroup = SINGLE_PROCESS,
    progress: StageProgress | None = None,
) -> FoundPlan:
    """Find one plan for ``model``, and fit its blocks to it; see ``PlanFinder`` and ``PlanFinder.find_plan``."""
    (budget or Budget()).check()
    finder = PlanFinder(
        model,
        images,
        name=name,
        transform=transform,
        mode=mode,
        seed=seed,
        bound=bound,
        process_group=process_group,
        progress=progress,
        magnitudes=needs_magnitudes(score, reader_of(model, name), mode, fit, budget or Budget(), summary),
    )
    try:
        return finder.find_plan(budget, cost=cost, score=score, fit=fit, layout=layout, summary=summary)
    finally:
        finder.close()


def needs_magnitudes(
    score: ScoreName, reader: ModelReader, mode: Mode, fit: Fit, budget: Budget, summary: bool = False
) -> bool:
    """Whether the features need Eq. 6's second factor for a search; raises ``UsageError`` for what does not go together."""
    return resolved_score(score, reader.head.fixed, mode, fit, budget, summary) in ("paper", "uniform")


def within_tolerance(search: TopDownSearch, budget: Budget, score: ScoreName) -> Selection:
    """The selection by tolerance; with ``snap``, the counts are rounded up, so that no error grows."""
    if score == "uniform":
        raise UsageError("--score uniform has one count for all blocks, and --tolerance one for each: pass --macs-reduction")
    selection = search.by_tolerance(budget.value)
    if budget.snap == 1:
        return selection
    counts = [len(kept) for kept in selection.kept]
    return search.by_counts(snapped(search, counts, budget.snap, "up"), budget.value)


def counts_for(search: ProfileEvaluator, budget: Budget, cost: Cost, score: ScoreName) -> list[int]:
    """Token counts per block that meet the budget."""
    if budget.criterion == "tokens":
        counts = budget.counts(search.tokens, search.depth, search.prefix)
        if search.fixed_head is not None and counts[-1] != search.fixed_head:
            raise UsageError(f"--tokens: the last block keeps what the head reads, {search.fixed_head}, not {counts[-1]}")
        if search.fixed_head is None and len(counts) > 1 and counts[-2] < counts[-1] + search.prefix:
            raise UsageError(
                f"--tokens: the last block keeps no prefix tokens for a head that pools, the others keep all {search.prefix}: "
                f"{counts[-1]} in the last block need at least {counts[-1] + search.prefix} in the one before"
            )
        return snapped(search, counts, budget.snap)
    within = uniform_within if score == "uniform" else profile_within
    return within(search, cost, budget.limit(cost), budget.snap)


def calibration_batches(
    images: ImageSet, transform: Any, process_group: ProcessGroup, digests: list[bytes]
) -> Iterator[Tensor]:
    """This process's batches of ``images``, in order; the digest of each is appended to ``digests``."""
    places = list(batch_slices(len(images), BATCH))
    own = [index for batch in process_group.own_batches(len(places)) for index in images.indices[places[batch]]]
    if not own:
        return
    for batch, _ in load_tensors(dataclasses.replace(images, indices=own), transform, BATCH):
        digests.append(hashlib.sha256(batch.numpy().tobytes()).digest())
        yield batch


def make_plan(
    model: Any,
    name: str,
    kept: list[list[int]],
    *,
    mode: Mode = "compact",
    merged_into: list[int] | None = None,
    origin: Origin | None = None,
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
        merged_into=merged_into,
        geometry=reader.geometry(),
        origin=origin or Origin(score="none", criterion="manual", value=0.0),
    )


def dense_plan(model: Any, name: str) -> SlimPlan:
    """The plan that drops nothing, not even in the last block."""
    check_supported(model, name)
    reader = ModelReader(model)
    origin = Origin(score="none", criterion="dense", value=0.0)
    return make_plan(model, name, [list(range(reader.tokens))] * len(reader.blocks), origin=origin)
