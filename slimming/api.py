"""Plans in Python: ``find_plan`` and ``PlanFinder`` search one, ``make_plan`` and ``dense_plan`` write one down."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor, nn

from patchslim.choices import Fit, Mode, ScoreName
from patchslim.errors import UsageError
from patchslim.macs import macs_of
from patchslim.plan import Calibration, Origin, SlimPlan
from slimming.data.source import ImageSet, Transform, load_tensors
from slimming.distributed import ProcessGroup, batch_slices
from slimming.fitting.block_sgd import BlockFitter
from slimming.fitting.closed_form import compensate
from slimming.models.reader import ModelReader, reader_of
from slimming.models.slim_vit import SlimViT
from slimming.models.vit_reader import VitReader
from slimming.search.budget import LATENCY
from slimming.search.costs import Cost, MacsCost
from slimming.search.counts import counts_within
from slimming.search.distillation import ChosenFit, check_distilled, chosen_fit
from slimming.search.features import BATCH, DenseFeatures, FeatureSettings
from slimming.search.few_blocks import Choice
from slimming.search.request import PlanRequest
from slimming.search.scores import score_named
from slimming.search.similarity import MergeSearch, SummarySearch, with_summary
from slimming.search.top_down import Selection, TopDownSearch


@dataclass(frozen=True)
class FoundPlan:
    """A plan, and the model to run under it: the given one, or a copy whose blocks were refitted to the cut."""

    plan: SlimPlan
    model: nn.Module
    fit: Fit
    finetune: dict[str, float | int | str] | None = None  # the recipe and its outcome, where there was one
    fit_reason: str | None = None  # where the fit was left to us, why it is this one


@dataclass(frozen=True)
class FinderSettings(FeatureSettings):
    """How dense features are made and held, as ``FeatureSettings`` says, and ``seed``, which random choices are drawn from."""

    seed: int = 0


class PlanFinder:
    """Searches any number of plans for one model on the model's dense features over calibration images.

    ``name`` goes into the plans; ``transform`` maps a PIL image to the model's input tensor (3, h, w), None where the images
    are such tensors. Every process of a group makes a finder with the same arguments and finds the same plans. Use it in a
    ``with`` block, which releases the features. Raises ``InputRejected`` for images that cannot be used.
    """

    def __init__(
        self,
        reader: VitReader,
        images: ImageSet,
        *,
        name: str,
        transform: Transform | None,
        settings: FinderSettings = FinderSettings(),
    ) -> None:
        self.reader, self.name, self.settings = reader, name, settings
        self.images, self.transform = images, transform
        self._evaluators: dict[tuple[ScoreName, bool], MergeSearch | SummarySearch | TopDownSearch] = {}
        digests: list[bytes] = []
        self.features = DenseFeatures(
            reader,
            _batches(images, transform, settings.process_group, digests),
            len(images),
            settings,
        )
        self.calibration = Calibration(
            data=f"{images.address} ({images.split}, {images.share})",
            images=len(images),
            fingerprint=settings.process_group.digest_over_batches(digests, len(self.features.places)),
        )

    def find_plan(
        self,
        request: PlanRequest = PlanRequest(),  # noqa: B008 - frozen
        cost: Cost | None = None,
        *,
        checkpoint: Path | None = None,
    ) -> FoundPlan:
        """Return the plan that meets ``request``, and the model with its blocks refitted as it asks.

        ``cost`` is what a latency budget is solved on; other budgets count MACs. A closed-form fit that the model lacks is
        left out: ``FoundPlan.fit`` says so. ``checkpoint`` is a folder from which an interrupted distillation goes on. Raises
        ``BudgetUnreachable``, ``UsageError`` for what the model does not allow, and ``ValueError`` where the settings' ``mode``
        or ``magnitudes`` are not those that the request needs.
        """
        reader, features = self.reader, self.features
        choice = self.chosen_fit(request)
        request = self._meant(request)
        assert request.fit != "auto"
        if request.budget.criterion not in LATENCY:
            cost = self._macs_cost(request)
        elif cost is None:
            raise UsageError(f"--{request.budget.criterion} is solved on a measured latency table: pass --latency-table")
        fitter = BlockFitter(features, progress=self.settings.progress) if request.fit == "sgd" else None
        selection, reason = self._selected(request, cost, fitter)
        budget = request.budget
        origin = Origin(
            score=request.score,
            criterion=budget.criterion,
            value=0.0 if budget.criterion == "tokens" else float(budget.value),
            tolerance=selection.tolerance,
            seed=self.settings.seed,
            calibration=self.calibration,
            snap=budget.snap,
            errors=[float(error) for error in selection.errors],
            merge_blocks=reason,
        )
        plan = plan_of(reader, self.name, selection.kept, mode=request.mode, merged_into=selection.merged_into, origin=origin)
        fitted = fitter.model if fitter is not None else reader.model
        if request.fit in ("closed-form", "distill"):
            fitted = copy.deepcopy(reader.model)
            if "closed-form" not in reader.refusals:
                compensate(fitted, features, plan, progress=self.settings.progress)
        learnt = self._distilled(fitted, plan, request, checkpoint) if request.fit == "distill" else None
        return FoundPlan(plan, fitted, request.fit, learnt, choice.reason if choice else None)

    def chosen_fit(self, request: PlanRequest) -> ChosenFit | None:
        """Return what ``--fit auto`` takes for this model and these images, and why; None where a fit is asked for."""
        reader = self.reader
        if request.fit != "auto":
            return None
        if "distill" in reader.refusals:
            return ChosenFit("closed-form", "this model cannot be distilled")
        macs = macs_of([reader.tokens] * len(reader.blocks), reader.tokens, reader.geometry())
        return chosen_fit(request.distillation, macs=macs, images=len(self.images), on_gpu=reader.device.type == "cuda")

    def _distilled(
        self, fitted: nn.Module, plan: SlimPlan, request: PlanRequest, checkpoint: Path | None
    ) -> dict[str, float | int | str]:
        """Distil ``fitted`` under ``plan`` from the dense model, in place; what is recorded of it."""
        from slimming.fitting.distill import distill

        settings = self.settings
        report = distill(
            SlimViT(fitted, plan),
            self.reader.model,
            self.images,
            self.transform,
            recipe=request.distillation,
            fingerprint=self.calibration.fingerprint,
            seed=settings.seed,
            process_group=settings.process_group,
            checkpoint=checkpoint,
            progress=settings.progress,
        )
        fitted.eval().requires_grad_(False)
        return report.as_dict()

    def _selected(self, request: PlanRequest, cost: Cost, fitter: BlockFitter | None) -> tuple[Selection, str | None]:
        """The tokens that the plan keeps, and, where it merges, what becomes of the others; why their counts were chosen."""
        budget, uniform = request.budget, request.score == "uniform"
        if budget.criterion == "tolerance":
            if uniform:
                raise UsageError(
                    "--score uniform has one count for all blocks, and --tolerance one for each: pass --macs-reduction"
                )
            found = self._top_down(request, fitter).by_tolerance(budget.value, snap=budget.snap)
            return (with_summary(found, self.features.tokens) if request.summary else found), None
        evaluator = self._evaluator(request)
        choice = self._choice(request, cost)
        return (evaluator if fitter is None else self._top_down(request, fitter)).by_counts(choice.counts), choice.reason

    def _choice(self, request: PlanRequest, cost: Cost) -> Choice:
        """The counts that meet a request which is meant for this model."""
        return counts_within(
            self._evaluator(request),
            request.budget,
            cost,
            request.where,
            uniform=request.score == "uniform",
        )

    def _evaluator(self, request: PlanRequest) -> MergeSearch | SummarySearch | TopDownSearch:
        """What chooses counts, and tokens by counts, for a request that is meant for this model."""
        key = request.score, request.summary
        if key not in self._evaluators:
            if request.score == "similarity":
                self._evaluators[key] = MergeSearch(self.features)
            else:
                search = self._top_down(request)
                self._evaluators[key] = SummarySearch(search) if request.summary else search
        return self._evaluators[key]

    def _top_down(self, request: PlanRequest, fitter: BlockFitter | None = None) -> TopDownSearch:
        return TopDownSearch(self.features, score_named(request.score, self.settings.seed), fit=fitter)

    def divergence(self, request: PlanRequest) -> float:
        """Return how far the plan that meets ``request`` moves the answers before any fit: a mean KL divergence in nats.

        It is taken on some of the calibration images, and costs a small part of ``find_plan``. For budgets of MACs or tokens.
        Raises as ``find_plan``.
        """
        request = self._meant(request)
        return self._evaluator(request).divergence(self._choice(request, self._macs_cost(request)).counts)

    def _meant(self, request: PlanRequest) -> PlanRequest:
        """``request`` for this model; raises ``ValueError`` where the features were not made for it."""
        if request.mode != self.settings.mode:
            raise ValueError(f"a plan of mode {request.mode} from features of mode {self.settings.mode}")
        if (choice := self.chosen_fit(request)) is not None:
            request = dataclasses.replace(request, fit=choice.fit)
        request = request.for_model(fixed_head=self.reader.head.fixed, refusals=self.reader.refusals)
        if request.needs_magnitudes and not self.settings.magnitudes:
            raise ValueError(f"score {request.score} needs features with magnitudes")
        return request

    def _macs_cost(self, request: PlanRequest) -> Cost:
        reader = self.reader
        tokens, depth = reader.tokens, len(reader.blocks)
        return MacsCost(tokens, depth, reader.geometry(), request.mode, request.layout, request.merges, request.also)

    def close(self) -> None:
        """Release the features, and what was spilled of them to disk."""
        self._evaluators.clear()
        self.features.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def find_plan(
    model: nn.Module,
    images: ImageSet,
    request: PlanRequest = PlanRequest(),  # noqa: B008 - frozen
    *,
    name: str,
    transform: Transform | None,
    cost: Cost | None = None,
    settings: FinderSettings = FinderSettings(),
) -> FoundPlan:
    """Return one plan for a timm model, and the model with its blocks refitted as ``request`` asks.

    Of ``settings``, ``mode`` and ``magnitudes`` follow from the request; the rest is as in ``PlanFinder``. Raises
    ``InputRejected`` for a model or images that cannot be used, and as ``PlanFinder.find_plan``.
    """
    request.check()
    if request.fit == "distill":
        check_distilled(images.address, len(images))
    reader = reader_of(model, name)
    meant = request.for_model(fixed_head=reader.head.fixed, refusals=reader.refusals)
    settings = dataclasses.replace(settings, mode=request.mode, magnitudes=meant.needs_magnitudes)
    with PlanFinder(reader, images, name=name, transform=transform, settings=settings) as finder:
        return finder.find_plan(request, cost)


def _batches(
    images: ImageSet, transform: Transform | None, process_group: ProcessGroup, digests: list[bytes]
) -> Iterator[Tensor]:
    """This process's batches of ``images``, in order; the digest of each is appended to ``digests``."""
    places = list(batch_slices(len(images), BATCH))
    own = [index for batch in process_group.own_batches(len(places)) for index in images.indices[places[batch]]]
    if not own:
        return
    for batch, _ in load_tensors(dataclasses.replace(images, indices=own), transform, BATCH):
        digests.append(hashlib.sha256(batch.numpy().tobytes()).digest())
        yield batch


def plan_of(
    reader: VitReader,
    name: str,
    kept: list[list[int]],
    *,
    mode: Mode = "compact",
    merged_into: list[int] | None = None,
    origin: Origin | None = None,
) -> SlimPlan:
    """Return a ``SlimPlan`` from the tokens that each block keeps.

    Raises ``pydantic.ValidationError`` where they break a rule of ``SlimPlan``.
    """
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


def make_plan(
    model: nn.Module,
    name: str,
    kept: list[list[int]],
    *,
    mode: Mode = "compact",
    merged_into: list[int] | None = None,
    origin: Origin | None = None,
) -> SlimPlan:
    """Return a ``SlimPlan`` for a timm model from the tokens that each block keeps; see ``plan_of``."""
    return plan_of(ModelReader(model), name, kept, mode=mode, merged_into=merged_into, origin=origin)


def dense_plan(model: nn.Module, name: str) -> SlimPlan:
    """Return the plan that drops nothing, not even in the last block.

    Raises ``InputRejected`` for a model that cannot be read.
    """
    return dense_plan_of(reader_of(model, name), name)


def dense_plan_of(reader: VitReader, name: str) -> SlimPlan:
    """Return the plan that drops nothing, not even in the last block."""
    origin = Origin(score="none", criterion="dense", value=0.0)
    return plan_of(reader, name, [list(range(reader.tokens))] * len(reader.blocks), origin=origin)
