"""Plans for ONNX graphs: ``slimming.api`` for a graph instead of a PyTorch model."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graph_passes.onnx_io.files import save_model
from graph_passes.pass_manager import slim
from patchslim.choices import Fit, Layout, Mode, ScoreName
from patchslim.errors import InputRejected, UsageError
from patchslim.plan import Calibration, Origin, SlimPlan
from patchslim.progress import StageProgress
from slimming.api import FoundPlan, calibration_batches, counts_for, within_tolerance
from slimming.data.source import ImageSet
from slimming.distributed import SINGLE_PROCESS, ProcessGroup
from slimming.onnx_models.masked_graph import OnnxExecutor
from slimming.onnx_models.reader import GraphReader, RuntimeModel
from slimming.search.budget import LATENCY, Budget
from slimming.search.costs import Cost, MacsCost
from slimming.search.features import DenseFeatures
from slimming.search.scores import Score, score_named
from slimming.search.top_down import Choose, Selection, TopDownSearch, TrialError
from slimming.tensor_store import DEFAULT_BOUND, TensorStore


class GraphSearch(TopDownSearch):
    """The search on a graph. Where its head reads single tokens beside a pool, the last block keeps the prefix tokens as well.

    Counts of the last block are then without them, as for other heads that pool.
    """

    def __init__(self, features: DenseFeatures, score: Score) -> None:
        super().__init__(features, score)
        self.beside: list[int] = getattr(self.head, "beside", [])

    @property
    def readable(self) -> int:
        """How many tokens of the last block the head can read, or pool."""
        return len(self.head.tokens) - len(self.beside)

    def _chooser(self, counts: Sequence[int], error: TrialError) -> Choose:
        return super()._chooser([*counts[:-1], counts[-1] + len(self.beside)], error)

    def _top(self, choose: Choose, batches: list[int]) -> tuple[list[int], float]:
        if not self.beside:
            return super()._top(choose, batches)

        def choose_pooled(block: int, base: list[int], above: list[int], ranking: list[int]) -> tuple[list[int], float]:
            pooled = [token for token in ranking if token not in set(self.beside)]
            return choose(block, sorted([*self.beside, pooled[0]]), above, pooled)

        return super()._top(choose_pooled, batches)


@dataclasses.dataclass(frozen=True)
class _WithPrefix:
    """What counts cost once ``beside`` prefix tokens are added to the last one."""

    cost: Cost
    beside: int

    @property
    def unit(self) -> str:
        return self.cost.unit

    def of(self, counts: Sequence[int]) -> float:
        before = counts[-2] if len(counts) > 1 else counts[-1] + self.beside
        return self.cost.of([*counts[:-1], min(counts[-1] + self.beside, before)])

    def dense(self) -> float:
        return self.cost.dense()


class GraphPlanFinder:
    """A graph with its dense features on calibration images: as ``slimming.api.PlanFinder``."""

    def __init__(
        self,
        reader: GraphReader,
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
        self.reader, self.name, self.mode, self.seed = reader, name, mode, seed
        digests: list[bytes] = []
        batches = calibration_batches(images, transform, process_group, digests)
        options: Any = {"mode": mode, "magnitudes": magnitudes, "store": TensorStore(bound), "process_group": process_group}
        model: Any = reader  # to the features, what a graph reader offers is a model reader
        self.features = DenseFeatures(model, batches, len(images), progress=progress, **options)
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
        """The plan that meets ``budget``, and the graph's own dense model. Raises ``BudgetUnreachable`` and ``UsageError``."""
        budget = budget or Budget()
        budget.check()
        if fit != "none" or summary or cost is not None or budget.criterion in LATENCY:
            raise UsageError("a plan for an ONNX graph has no fit, no summary and no latency budget")
        if score == "similarity":
            raise UsageError("a plan for an ONNX graph loses tokens by a score, and merges none")
        score = "paper" if score == "auto" else score
        search = GraphSearch(self.features, score_named(score, self.seed))
        if budget.criterion == "tolerance":
            selection = within_tolerance(search, budget, score)
        else:
            selection = search.by_counts(self._counts(search, budget, score, layout))
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
        return FoundPlan(self._plan(selection, origin), self.reader.model, "none")

    def _counts(self, search: GraphSearch, budget: Budget, score: ScoreName, layout: Layout) -> list[int]:
        reader, beside = self.reader, len(search.beside)
        cost: Cost = MacsCost(reader.tokens, len(reader.blocks), reader.geometry(), self.mode, layout)
        if beside and budget.criterion == "tokens":
            budget.counts(search.tokens, search.depth, search.prefix)
            *rest, last = budget.tokens
            if last <= beside:
                raise UsageError(
                    f"--tokens: the last block keeps the {beside} prefix tokens and a patch, so at least {beside + 1}"
                )
            budget = dataclasses.replace(budget, tokens=(*rest, last - beside))
        return counts_for(search, budget, _WithPrefix(cost, beside) if beside else cost, score)

    def _plan(self, selection: Selection, origin: Origin) -> SlimPlan:
        reader = self.reader
        return SlimPlan(
            model=self.name,
            tokens=reader.tokens,
            grid=reader.grid,
            prefix_tokens=reader.prefix,
            pooling=reader.head.pooling,
            head_tokens=reader.head.tokens if reader.head.fixed else [],
            mode=self.mode,
            kept=selection.kept,
            geometry=reader.geometry(),
            origin=origin,
        )

    def close(self) -> None:
        """Let go of the features."""
        self.features.close()


def slim_model(reader: GraphReader, plan: SlimPlan, layout: Layout = "split") -> RuntimeModel:
    """The graph with the plan's tokens cut out, in ONNX Runtime. Raises ``InputRejected`` where that cannot be done."""
    graph = reader.graph
    try:
        with contextlib.redirect_stdout(sys.stderr):  # onnx-graphsurgeon logs to stdout, which is kept for the result
            result = slim(graph.original, plan, layout=layout)
    except InputRejected as error:
        raise InputRejected(f"{graph.path}: {error}") from error
    with tempfile.TemporaryDirectory(prefix="patchslim-") as folder:
        path = Path(folder) / "slim.onnx"
        save_model(result.model, path)
        return reader.runtime(OnnxExecutor(path, f"{graph.path}, cut", graph.batch))
