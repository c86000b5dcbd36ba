"""``python -m validate.run BUNDLE``: check a bundle on any device; whole with the ``edge`` extra, its records without it."""

from __future__ import annotations

if __name__ == "__main__":
    from patchslim.interrupts import end_when_interrupted

    end_when_interrupted()

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from patchslim.cli import error_record, run_command
from patchslim.text import printable
from validate.engine_runs import EngineChoice
from validate.options import ValidateOptions

if TYPE_CHECKING:
    from validate.attestation import DeviceImages
    from validate.parity_records import Rung
    from validate.verdict import BundleVerdict

EXAMPLES = (
    "bundles/vit_ti-ort",
    "bundles/vit_ti-ort --images images/ --json > attestation.json",
)


def run(options: ValidateOptions, prog: str = "validate") -> int:
    """Check the bundle, print what was found, and return the exit code: 0 right, 3 broken, 5 wrong answers.

    ``prog`` is the command's name, which messages begin with.
    Raises ``Unavailable`` where models are to be run and cannot be: with ``images``, an ``engine``, a ``provider``, ``build``
    or ``require_executed``.
    """
    options.check()
    from rich.markup import escape

    from patchslim.console import Console

    with Console(stderr=True).status("") as status:
        found = _sent(options) if options.attestation else _checked(options, lambda what: status.update(escape(what)))
    verdict = found.verdict
    _print(found, options, prog)
    for fault in verdict.faults:
        print(f"{prog}: {printable(fault)}", file=sys.stderr)
    if verdict.unchecked:
        from patchslim.packages import install_command

        unchecked = f"{len(verdict.unchecked)} of {len(verdict.checks)} checks need packages that are not installed"
        print(f"{prog}: {unchecked}; install them: {install_command('edge')}", file=sys.stderr)
    return verdict.exit_code


@dataclasses.dataclass(frozen=True)
class Found:
    """What a run of the door has to show; ``images`` and ``measured`` where there were images, None and empty otherwise."""

    verdict: BundleVerdict
    measured: list[Rung] = dataclasses.field(default_factory=list)
    images: DeviceImages | None = None


def _checked(options: ValidateOptions, say: Callable[[str], None]) -> Found:
    """Check the bundle here, in the engines asked for, and on images if there are any."""
    from patchslim.ort_runner import CPU
    from validate.check import check_bundle
    from validate.engine_checks import Running
    from validate.isolated import Limits

    memory = None if options.memory is None else round(options.memory * (1 << 30))
    needs_ort = options.images is not None and not options.engine
    provider = options.provider or (CPU if needs_ort or "ort" in options.engine else None)
    how = Running(options.choice, Limits(options.timeout, memory), provider, options.threads)

    def check(engines: EngineChoice) -> BundleVerdict:
        return check_bundle(
            options.bundle,
            provider=provider,
            threads=options.threads,
            progress=say,
            limits=how.limits,
            expect_manifest_sha256=options.expect_manifest_sha256,
            require_executed=options.require_executed and bool(engines.keys is None or engines.keys),
            engines=engines,
            public_key=options.public_key,
        )

    if options.build:
        from validate.recipe_run import build_engine

        verdict = check(EngineChoice(()))
        if not verdict.passed:
            return Found(verdict)
        say("building the engine")
        build_engine(options.bundle, options.built_folder, next((key for key in options.engine if key in ("trt", "rtx")), None))
        how = dataclasses.replace(how, choice=dataclasses.replace(how.choice, built=options.built_folder))
    verdict = check(how.choice)
    if options.images is None or not verdict.passed or verdict.manifest is None:
        return Found(verdict)
    from validate.measure import ImageGates, measure

    gates = ImageGates(options.min_top1, options.max_top1_drop)
    runs = verdict.engines
    bundle = (options.bundle, verdict.manifest)
    measured = measure(bundle, options.images, gates, how, runs, options.batch)
    engines = [run.model_copy(update={"accuracy": rung}) for run, rung in zip(runs, measured.rungs, strict=True)]
    checks = [*verdict.checks, *measured.notes, *measured.checks]
    verdict = verdict.model_copy(update={"checks": checks, "engines": engines})
    first = [run.accuracy for run in engines if run.engine == engines[0].engine and run.accuracy is not None]
    return Found(verdict, first, measured.images)


def _sent(options: ValidateOptions) -> Found:
    """Check the bundle's files and records here, and what a device says of it."""
    from validate.attestation import check_attestation
    from validate.check import check_bundle

    assert options.attestation is not None
    verdict = check_bundle(
        options.bundle,
        expect_manifest_sha256=options.expect_manifest_sha256,
        engines=EngineChoice(()),
        public_key=options.public_key,
    )
    if verdict.passed:
        checks = check_attestation(options.attestation, options.bundle, verdict)
        verdict = verdict.model_copy(update={"checks": [*verdict.checks, *checks]})
    return Found(verdict)


def _print(found: Found, options: ValidateOptions, prog: str) -> None:
    verdict = found.verdict
    if options.json:
        import json

        if options.attestation:
            kept = {"passed": verdict.passed, "exit_code": verdict.exit_code, "unchecked": verdict.unchecked, "measured": []}
            record = verdict.model_dump(mode="json") | kept
        else:
            from validate.attestation import attest

            record = attest(verdict, found.measured, found.images).model_dump(mode="json", exclude={"error"})
        if (error := verdict.error) is not None:
            record["error"] = error_record(error, prog)
        print(json.dumps(record, indent=1))
        return
    from patchslim.console import Console
    from validate.report import print_verdict

    wide = None if sys.stdout.isatty() else 120  # a log file has no width to wrap to
    print_verdict(verdict, found.measured, Console(width=wide))


def main(prog: str = "validate") -> int:
    """The command line's entry point, called ``prog`` in its messages; returns the exit code."""
    description = ValidateOptions.__doc__ or ""
    check = functools.partial(run, prog=prog)
    return run_command(ValidateOptions, check, prog=prog, description=description, extra="edge", examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
