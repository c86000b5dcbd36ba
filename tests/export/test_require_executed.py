"""``--require-executed``: an engine that ran is published, one that did not is exit code 5, at once where that is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export.engines.base import TARGETS
from export.pipeline import GateFailed, export_bundle
from patchslim import cuda
from patchslim.errors import ParityFailed
from tests.helpers.commands import door_here
from tests.helpers.exports import command, read, tiny
from validate import check_bundle

if TYPE_CHECKING:
    from export.pipeline import Outcome

ELSEWHERE = next(target for target in ("sm89", "sm86") if target in TARGETS and target != cuda.local_target())


def test_onnx_runtime_runs_and_is_published(ort_export: Outcome, export_work: Path) -> None:
    outcome = export_bundle(tiny(export_work, "required", require_executed=True))
    assert (outcome.engine.executed, outcome.bundle.name) == (True, "required")
    assert check_bundle(outcome.bundle, threads=1, require_executed=True).passed


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_engine_for_another_machine_is_refused_before_the_work(tmp_path: Path, more: list[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    arguments = command(tmp_path / "work", "bundle", "--engine", "trt", "--target", ELSEWHERE, "--require-executed", *more)
    done = door_here(arguments)
    assert done.returncode == 5, done.stderr
    assert f"--require-executed: an engine for {ELSEWHERE} cannot run on this machine; run this command on one" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_engine_that_could_not_be_run_is_not_published(
    trt_export: Outcome, export_work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver names a GPU, and then the engine cannot be loaded on it: said to be sm89's, where there is no GPU at all."""
    if cuda.local_target() is not None:
        pytest.skip("here an engine runs")
    before = trt_export.bundle.stat().st_mtime_ns
    monkeypatch.setattr("patchslim.cuda.local_target", lambda: "sm89")
    with pytest.raises(GateFailed, match=r"engine: built, not executed \(.+\), and --require-executed asks for that") as raised:
        export_bundle(tiny(export_work, trt_export.bundle.name, engine="trt", target=("sm89",), require_executed=True))
    failed = raised.value.outcome.bundle
    assert isinstance(raised.value, ParityFailed)
    assert failed == export_work / f"{trt_export.bundle.name}.failed"
    assert read(failed / "manifest.json")["engine"]["status"] == "not executed"
    assert f"{trt_export.bundle} is an earlier one" in str(raised.value)
    assert trt_export.bundle.stat().st_mtime_ns == before
