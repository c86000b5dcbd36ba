"""What would probably have passed, where a plan lost more than the gate allows: an estimate from the calibration images."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from export.logits import PYTORCH_SLIM
from export.options import ExportOptions
from export.source import ExportSource
from export.stages import Workspace
from patchslim.errors import PatchslimError
from slimming.search.budget import Budget
from slimming.session import open_finder
from validate.manifest import ParityReport

#: Halvings of the reductions between none and the one that failed.
_STEPS = 6
#: The last one's step: reductions are named in whole percent.
_UNIT = 0.01


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


def what_would_pass(options: ExportOptions, source: ExportSource, parity: ParityReport, work: Workspace) -> Advice | None:
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
    drop, failed = 100 * (lost - gained) / slim.images, parity.macs.reduction
    limit = parity.gate.max_top1_drop / (1 if parity.gate.rule == "point" else 2)
    if drop <= 0 or failed <= _UNIT:
        return None
    work.reporter.say("estimating what would have passed")
    try:
        with work.reporter.stages() as progress, open_finder(options, source.session, progress) as finder:
            request = options.request(options.layout)

            def expected(reduction: float) -> float:
                budget = Budget("macs-reduction", reduction, snap=options.snap)
                return finder.divergence(dataclasses.replace(request, budget=budget))

            unit = drop / max(expected(failed), 1e-12)
            low, high, found = 0.0, failed, 0.0
            for _ in range(_STEPS):
                middle = (low + high) / 2
                if (points := unit * expected(middle)) <= limit:
                    low, found = middle, points
                else:
                    high = middle
    except PatchslimError:
        return None
    reduction = math.floor(low / _UNIT + 1e-9) * _UNIT
    return Advice(round(reduction, 2), max(0.0, found), len(source.session.calibration)) if reduction > 0 else None
