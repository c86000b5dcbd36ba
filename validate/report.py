"""Prints a verdict as tables: the build's rungs, the checks, the rungs measured here."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from patchslim.console import Console
from validate.engine_runs import EngineRun
from validate.explain import blame, what_it_proves
from validate.parity_records import Rung
from validate.verdict import BundleVerdict

_STYLES = {"passed": "green", "failed": "red", "undecided": "red", "not executed": "yellow"}


def print_verdict(verdict: BundleVerdict, measured: list[Rung], console: Console) -> None:
    """Print the build's rungs, the checks made here and, where images were given, the rungs measured on them."""
    if verdict.manifest is not None:
        manifest = verdict.manifest
        macs = manifest.macs
        engines = "; ".join(
            f"{escape(engine.backend)} {escape(engine.precision)} for {escape(', '.join(engine.targets)) or 'no target'}"
            for engine in manifest.engines_by_stage.values()
        )
        console.print(
            f"{escape(manifest.name)}: {macs.slim / 1e9:.4g} of {macs.dense / 1e9:.4g} GMACs ({macs.reduction:.1%} saved), "
            f"{engines}"
        )
        evaluation = manifest.evaluation
        where = f"{evaluation.data}, {evaluation.images} images"
        _print_rungs(manifest.rungs, f"Measured by the build ({escape(where)})", console)
        if verdict.max_top1_drop is not None:
            for line in what_it_proves(manifest.rungs, verdict.max_top1_drop, verdict.gate_rule):
                console.print(escape(line), highlight=False)
    console.print(_check_table(verdict))
    if verdict.engines:
        console.print(_engine_table(verdict.engines))
    if measured:
        console.print(rung_table(measured, "Measured here on the images given"))
    word = "passed" if verdict.passed else "failed"
    limit = " as far as it could be checked here" if verdict.unchecked and verdict.passed else ""
    console.print(f"[{_STYLES[word]}]{word}[/]{limit}: exit code {verdict.exit_code}")


def _print_rungs(rungs: list[Rung], title: str, console: Console) -> None:
    console.print(rung_table(rungs, title))
    for rung in rungs:
        if rung.note:
            console.print(f"  {rung.stage}: {escape(rung.note)}", highlight=False)


def rung_table(rungs: list[Rung], title: str) -> Table:
    """A row per stage; blank where a number does not apply."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("stage", "images", "top-1", "top-5", "drop", "95 % CI", "agree", "max err", "against", "status"):
        table.add_column(heading, overflow="fold")
    for rung in rungs:
        interval = rung.drop_interval
        table.add_row(
            rung.stage,
            str(rung.images),
            _number(rung.top1),
            _number(rung.top5),
            _number(rung.top1_drop),
            "" if interval is None else f"{interval[0]:.2f}..{interval[1]:.2f}",
            _number(rung.agreement),
            "" if rung.max_error is None else f"{rung.max_error:.2g}",
            rung.compared_to or "",
            _status(rung.status),
        )
    return table


def blame_table(rungs: list[Rung]) -> Table:
    """Which stage lost what, against the stage that it was made from."""
    table = Table(title="Where it was lost", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("stage", "made from", "points lost there", "max logit error"):
        table.add_column(heading, overflow="fold")
    for each in blame(rungs):
        error = "" if each.max_error is None else f"{each.max_error:.2g}"
        table.add_row(each.stage, each.before, f"{each.points:+.2f}", error)
    return table


def _check_table(verdict: BundleVerdict) -> Table:
    table = Table(title=f"Checks of {escape(verdict.folder)}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("check", "file", "status", "found"):
        table.add_column(heading, overflow="fold")
    for check in verdict.checks:
        table.add_row(check.name, escape(check.subject), _status(check.status), escape(check.detail))
    return table


def _engine_table(runs: list[EngineRun]) -> Table:
    """A row per model and engine, with the median time of a batch by batch size."""
    table = Table(title="Run here", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    batches = sorted({point.batch for run in runs for point in run.latency})
    headings = ("engine", "on", "file", "golden max err", "top-1", *(f"ms at batch {batch}" for batch in batches), "status")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for run in runs:
        times = {point.batch: f"{point.p50_ms:.3g}" for point in run.latency}
        error = None if run.golden is None else run.golden.max_error
        table.add_row(
            f"{run.engine} {escape(run.version)}",
            escape(run.on),
            escape(run.file),
            "" if error is None else f"{error:.2g}",
            _number(None if run.accuracy is None else run.accuracy.top1),
            *(times.get(batch, "") for batch in batches),
            _status(run.status),
        )
    return table


def _status(status: str) -> str:
    return f"[{_STYLES[status]}]{status}[/]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
