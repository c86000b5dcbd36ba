"""What a failed gate says would have passed: from calibration images, and only where the plan is what failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export import export_bundle
from export.pipeline import GateFailed
from patchslim.errors import ParityFailed
from tests.helpers.commands import door_here
from tests.helpers.exports import change_plan, command, stages_in, tiny

if TYPE_CHECKING:
    from export.pipeline import Outcome


def test_the_reduction_that_is_named_does_pass(export_work: Path) -> None:
    with pytest.raises(GateFailed) as caught:
        export_bundle(tiny(export_work, "advised", macs_reduction=0.5, max_top1_drop=0.0, eval_images=400, fit="none"))
    advice = caught.value.outcome.advice
    assert advice is not None
    assert 0 < advice.macs_reduction < 0.5
    assert advice.calibration_images == 24
    assert caught.value.next_step.startswith(
        f"pass --macs-reduction {advice.macs_reduction:g}, which would probably have passed"
    )
    stages = _kept(export_work)
    with pytest.raises(GateFailed) as again:  # and is not estimated twice
        export_bundle(tiny(export_work, "advised", macs_reduction=0.5, max_top1_drop=0.0, eval_images=400, fit="none"))
    assert again.value.outcome.advice == advice
    assert _kept(export_work) == stages
    changes = {"macs_reduction": advice.macs_reduction, "max_top1_drop": 0.0, "eval_images": 400, "fit": "none"}
    assert export_bundle(tiny(export_work, "advised", **changes)).parity.passed


def _kept(work: Path) -> dict[str, int]:
    """The stages in the cache; the failed bundle beside them is written by every run."""
    return {name: at for name, at in stages_in(work).items() if not name.endswith(".failed")}


def test_json_has_verdict_blame_and_advice(export_work: Path) -> None:
    more = ["--eval-images", "400", "--macs-reduction", "0.5", "--fit", "none", "--max-top1-drop", "0", "--json"]
    done = door_here(command(export_work, "advised-json", *more))
    assert done.returncode == 5
    found = json.loads(done.stdout)
    assert found["verdict"].startswith("pytorch-slim: top-1 drops by 0.500 points, more than 0 (onnx-slim and engine")
    assert [each["stage"] for each in found["blame"]] == ["pytorch-slim", "onnx-slim", "engine"]
    assert [each["points"] for each in found["blame"]] == pytest.approx([0.5, 0, 0])
    assert found["advice"]["macs_reduction"] < 0.5
    assert found["error"]["next"].startswith("pass --macs-reduction")
    assert found["comparison"]["candidate"]["stage"] == "onnx-slim"
    assert done.stderr.count("top-1 drops by") == 1


def test_a_plan_of_ones_own_gets_no_advice(ort_export: Outcome, export_work: Path, tmp_path: Path) -> None:
    savage = change_plan(ort_export.bundle / "plan.json", tmp_path / "plan.json", [[0]] * 3)
    with pytest.raises(ParityFailed) as caught:
        export_bundle(tiny(export_work, "own-plan", plan=savage, max_top1_drop=1.0))
    assert isinstance(caught.value, GateFailed)
    assert caught.value.outcome.advice is None


def test_confidence_that_few_images_cannot_give_is_exit_5(export_work: Path) -> None:
    with pytest.raises(GateFailed, match="images would settle it") as caught:
        export_bundle(tiny(export_work, "confident", max_top1_drop=1.0, gate="confidence"))
    assert {one.status for one in caught.value.outcome.parity.rungs[1:]} == {"undecided"}
    assert caught.value.exit_code == 5
