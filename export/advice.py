"""What would probably have passed, where a plan lost more than the gate allows: an estimate from the calibration images."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from export.options import ExportOptions
from export.source import ExportSource
from export.stage_names import PYTORCH_SLIM
from export.stages import Workspace
from patchslim.errors import BudgetUnreachable, UsageError
from patchslim.plan import SlimPlan
from patchslim.records import StrictRecord, load_record, save_record
from slimming.search.budget import Budget
from slimming.session import open_finder
from validate.parity_records import ParityReport

#: Halvings of the reductions between none and the one that failed.
_STEPS = 6
#: The last one's step: reductions are named in whole percent.
_UNIT = 0.01
_TINY = 1e-12  # nats


@dataclass(frozen=True)
class Advice:
    """A reduction of the MACs that would probably have passed, as a fraction, and the drop that is expected of it in points."""

    macs_reduction: float
    expected_drop: float
    calibration_images: int

    def __str__(self) -> str:
        return (
            f"pass --macs-reduction {self.macs_reduction:g}, which would probably have passed (a drop of about "
            f"{self.expected_drop:.2f} points: an estimate from {self.calibration_images} calibration images)"
        )


def what_would_pass(
    options: ExportOptions, source: ExportSource, plan: SlimPlan, parity: ParityReport, work: Workspace
) -> Advice | None:
    """The largest reduction of the MACs whose expected drop is within the gate; None where the plan is not what failed.

    The drop is taken to grow with the mean KL divergence of the plan's answers from the original's, before any fit: what the
    plan that failed lost on the held-out images, times the ratio of the two divergences on the calibration images. Half of the
    gate is aimed at by the rule ``confidence``, whose interval wants room.
    """
    slim = next((one for one in parity.rungs if one.stage == PYTORCH_SLIM), None)
    if slim is None or slim.status not in ("failed", "undecided") or slim.non_finite or options.plan or options.dense:
        return None
    if options.tolerance is not None or options.finetune_epochs:
        return None
    lost, gained = slim.changed
    drop, failed = 100 * (lost - gained) / slim.images, 1 - plan.macs(options.search_layout) / plan.dense_macs()
    limit = parity.gate.max_top1_drop / (1 if parity.gate.rule == "point" else 2)
    if drop <= 0 or failed <= _UNIT:
        return None
    folder = work.cache.path(
        "advice",
        model=source.model.key,
        calibration=source.calibration_fingerprint,
        request=dataclasses.asdict(options.request(options.search_layout)),
        failed=(failed, drop, limit),
    )

    def build(part: Path) -> None:
        work.reporter.say("estimating what would have passed")
        found = _largest_within(options, source, failed, limit / drop, work)
        save_record(part / "advice.json", Estimate(reduction=found[0], share=found[1]))

    try:
        work.cache.make(folder, build)
    except (BudgetUnreachable, UsageError):
        return None
    found = load_record(folder / "advice.json", Estimate, "advice")
    if found.reduction == 0:
        return None
    return Advice(found.reduction, drop * found.share, source.calibration.images)


class Estimate(StrictRecord):
    """A reduction in whole percent, as a fraction, and its divergence as a share of that of the plan that failed; 0: none."""

    reduction: Annotated[float, Field(ge=0, le=1)]
    share: Annotated[float, Field(ge=0)]


def _largest_within(
    options: ExportOptions, source: ExportSource, failed: float, share: float, work: Workspace
) -> tuple[float, float]:
    """The largest reduction whose divergence is within ``share`` of that at ``failed``, and its own share of it."""
    request = options.request(options.search_layout)
    with work.reporter.stages() as progress, open_finder(options, source.session, progress) as finder:

        def divergence(reduction: float) -> float:
            budget = Budget("macs-reduction", reduction, snap=options.snap)
            return max(0.0, finder.divergence(dataclasses.replace(request, budget=budget)))

        whole = max(divergence(failed), _TINY)
        low, high, found = 0.0, failed, 0.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if (part := divergence(middle) / whole) <= share:
                low, found = middle, part
            else:
                high = middle
    return round(math.floor(low / _UNIT + 1e-9) * _UNIT, 2), found
