"""``python -m benchmarks.latency``: dense and slim side by side in ONNX Runtime, against the speed-up that the MACs promise."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

from patchslim.choices import Layout
from patchslim.cli import run_command
from patchslim.errors import UsageError


@dataclasses.dataclass(frozen=True)
class SideBySideOptions:
    """Options of ``benchmarks.latency``. The MAC ratio comes from --macs-ratio, --plan or --bundle."""

    dense: Path
    """The dense ONNX file; an export keeps it in its work folder."""
    slim: Path | None = None
    """The slim ONNX file; with --bundle its model.onnx."""
    bundle: Path | None = None
    """A bundle, for its slim ONNX file and its MAC ratio."""
    plan: Path | None = None
    """A plan.json, for its MAC ratio."""
    layout: Layout = "split"
    """With --plan: how the cut projections are laid, split or packed."""
    macs_ratio: float | None = None
    """Dense MACs / slim MACs."""
    batch: int = 8
    """Images per run."""
    threads: int = 1
    """Threads of ONNX Runtime."""
    rounds: int = 30
    """Pairs of runs."""
    warmup: int = 3
    """Runs of each before the first pair."""
    timeout: float = 300.0
    """Seconds that a model may take to load, or for a run; then it is ended."""
    memory: float | None = None
    """GiB of memory that a model may take; 0 is no bound. Default: 4, and four times the files in its folder."""
    json: bool = False
    """Print one JSON object instead of a table."""


def compare(options: SideBySideOptions) -> int:
    """Measure and print; the exit code is 0 whether or not the criterion is met."""
    if min(options.batch, options.threads, options.rounds) < 1 or options.warmup < 0:
        raise UsageError("--batch, --threads and --rounds must be at least 1, --warmup must not be negative")
    if not 0 < options.timeout < math.inf or (options.memory is not None and not 0 <= options.memory <= 1 << 20):
        raise UsageError("--timeout must be a positive number of seconds, --memory GiB or 0 for no bound")
    slim, ratio = _slim_and_ratio(options)
    from validate.isolated import Limits
    from validate.latency import CRITERION, compare_latency

    report = compare_latency(
        options.dense,
        slim,
        ratio,
        batch=options.batch,
        threads=options.threads,
        rounds=options.rounds,
        warmup=options.warmup,
        limits=Limits(options.timeout, None if options.memory is None else round(options.memory * (1 << 30))),
    )
    if options.json:
        print(report.model_dump_json(indent=1))
        return 0
    from patchslim.console import Console

    print_ = Console(highlight=False).print
    print_(f"dense {report.dense_ms:.2f} ms, slim {report.slim_ms:.2f} ms for a batch of {report.batch} (medians)")
    print_(f"speed-up {report.speedup:.3f} ({report.speedup_p10:.3f} to {report.speedup_p90:.3f}, 10th to 90th percentile)")
    if report.macs_ratio is not None:
        verdict = "met" if report.meets_criterion else "not met"
        print_(f"MAC ratio {report.macs_ratio:.3f}, speed-up / MAC ratio {report.efficiency:.3f}: {CRITERION} is {verdict}")
    return 0


def _slim_and_ratio(options: SideBySideOptions) -> tuple[Path, float | None]:
    """The slim ONNX file, and dense MACs over slim MACs where they are known; raises ``PatchslimError``."""
    if sum(source is not None for source in (options.bundle, options.plan, options.macs_ratio)) > 1:
        raise UsageError("--bundle, --plan and --macs-ratio each give the MAC ratio: name one of them")
    slim, ratio = options.slim, options.macs_ratio
    if options.bundle is not None:
        from validate.bundle import load_manifest

        manifest = load_manifest(options.bundle)
        slim = slim or options.bundle / next(record.path for record in manifest.onnx if record.max_error is not None)
        ratio = manifest.macs.dense / max(manifest.macs.slim, 1)
    elif options.plan is not None:
        from patchslim.plan import load_plan

        plan = load_plan(options.plan)
        ratio = plan.dense_macs() / plan.macs(options.layout)
    if slim is None:
        raise UsageError("--slim is needed, or --bundle")
    if ratio is not None and not ratio > 0:
        raise UsageError("--macs-ratio must be positive")
    return slim, ratio


def main() -> int:
    """The command line's entry point; returns the exit code."""
    description = "Measure a dense and a slim ONNX file side by side in ONNX Runtime."
    return run_command(SideBySideOptions, compare, prog="benchmarks.latency", description=description)


if __name__ == "__main__":
    sys.exit(main())
