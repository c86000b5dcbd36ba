"""``python -m validate.run BUNDLE``: check a bundle on any device; whole with the ``edge`` extra, its records without it."""

from __future__ import annotations

if __name__ == "__main__":
    from patchslim.interrupts import end_when_interrupted

    end_when_interrupted()

import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from patchslim.cli import error_record, run_command
from patchslim.errors import UsageError
from patchslim.text import printable

if TYPE_CHECKING:
    from validate.manifest import Rung
    from validate.verdict import BundleVerdict

EXAMPLES = (
    "bundles/vit_ti-ort",
    "bundles/vit_ti-ort --images images/ --threads 1",
)


@dataclasses.dataclass(frozen=True)
class BundleGroup:
    """What is checked."""

    bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BUNDLE")]
    """The bundle's folder."""


@dataclasses.dataclass(frozen=True)
class ImageGroup:
    """Images to measure the bundle on as well."""

    images: Path | None = None
    """A folder of images to measure top-1 and top-5 on as well: one subfolder per class, named as in the bundle's labels."""
    batch: int = 8
    """Images per run when --images is measured."""
    min_top1: Annotated[float | None, tyro.conf.arg(metavar="PERCENT")] = None
    """Fail with exit code 5 where top-1 on --images is less than this."""
    max_top1_drop: Annotated[float | None, tyro.conf.arg(metavar="POINTS")] = None
    """Fail with exit code 5 where top-1 on --images is more than this below the bundle's own."""


@dataclasses.dataclass(frozen=True)
class EngineGroup:
    """How ONNX Runtime runs."""

    provider: str | None = None
    """ONNX Runtime's execution provider. Default: CPUExecutionProvider; without ONNX Runtime no model is run."""
    threads: int = 0
    """Threads of ONNX Runtime; 0 leaves the choice to it."""


@dataclasses.dataclass(frozen=True)
class OutputGroup:
    """What is printed."""

    json: bool = False
    """Print the verdict as one JSON object instead of tables."""


@dataclasses.dataclass(frozen=True)
class TrustGroup:
    """What is not believed. The digests in manifest.json prove that the files are whole and belong together, and nothing
    against one who can write the folder and so the manifest too: only a manifest's digest that came another way does."""

    expect_manifest_sha256: Annotated[str | None, tyro.conf.arg(metavar="HEX")] = None
    """SHA-256 that manifest.json must have, from whoever made the bundle; any other is refused with exit code 3."""
    require_executed: bool = False
    """Fail with exit code 5 where the engine never ran on the machine that built it, and with 4 where anything of the bundle
    cannot be checked here."""
    timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 300.0
    """Seconds that a model may take to load and answer the golden inputs, or a batch of --images; then it is ended."""
    memory: Annotated[float | None, tyro.conf.arg(metavar="GIB")] = None
    """GiB of memory that a model may take on the CPU; 0 is no bound. Default: 4, and four times the bundle's size."""


@dataclasses.dataclass(frozen=True)
class ValidateOptions(OutputGroup, TrustGroup, EngineGroup, ImageGroup, BundleGroup):
    """Check a patchslim bundle whole: digests, contracts and the ONNX files' answers to the golden inputs."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if self.threads < 0 or self.batch < 1:
            raise UsageError("--threads must not be negative, --batch must be at least 1")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise UsageError(f"--timeout {self.timeout}: must be a positive number of seconds")
        if self.memory is not None and not 0 <= self.memory <= 1 << 20:
            raise UsageError(f"--memory {self.memory}: must be GiB, or 0 for no bound")
        for option, value in (("--min-top1", self.min_top1), ("--max-top1-drop", self.max_top1_drop)):
            if value is not None and self.images is None:
                raise UsageError(f"{option} needs --images, a folder of images to measure")
            if value is not None and not 0 <= value <= 100:
                raise UsageError(f"{option} {value}: must be from 0 to 100")
        sha256 = self.expect_manifest_sha256
        if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
            raise UsageError(f"--expect-manifest-sha256 {sha256}: must be 64 hexadecimal digits, as sha256sum prints them")


def run(options: ValidateOptions) -> int:
    """Check the bundle, print what was found, and return the exit code: 0 right, 3 broken, 5 wrong answers.

    Raises ``Unavailable`` where models are to be run and cannot be: with ``images``, a ``provider`` or ``require_executed``.
    """
    options.check()
    from rich.markup import escape

    from patchslim.console import Console
    from patchslim.ort_runner import CPU
    from patchslim.packages import install_command
    from validate.check import check_bundle
    from validate.isolated import Limits

    memory = None if options.memory is None else round(options.memory * (1 << 30))
    limits = Limits(options.timeout, memory)
    provider = options.provider or (None if options.images is None else CPU)
    errors = Console(stderr=True)
    measured: list[Rung] = []
    with errors.status("") as status:
        verdict = check_bundle(
            options.bundle,
            provider=provider,
            threads=options.threads,
            progress=lambda what: status.update(escape(what)),
            limits=limits,
            expect_manifest_sha256=options.expect_manifest_sha256,
            require_executed=options.require_executed,
        )
        if options.images is not None and verdict.passed and verdict.manifest is not None:
            from validate.measure import ImageGates, measure

            measured, checks = measure(
                options.bundle,
                verdict.manifest,
                options.images,
                ImageGates(options.min_top1, options.max_top1_drop),
                batch=options.batch,
                provider=provider or CPU,
                threads=options.threads,
                limits=limits,
            )
            verdict = verdict.model_copy(update={"checks": [*verdict.checks, *checks]})
    _print(verdict, measured, options)
    for fault in verdict.faults:
        print(f"validate: {printable(fault)}", file=sys.stderr)
    if verdict.unchecked:
        unchecked = f"{len(verdict.unchecked)} of {len(verdict.checks)} checks need packages that are not installed"
        print(f"validate: {unchecked}; install them: {install_command('edge')}", file=sys.stderr)
    return verdict.exit_code


def _print(verdict: BundleVerdict, measured: list[Rung], options: ValidateOptions) -> None:
    if options.json:
        import json

        record = verdict.model_dump(mode="json") | {
            "passed": verdict.passed,
            "exit_code": verdict.exit_code,
            "unchecked": verdict.unchecked,
            "measured": [one.model_dump(mode="json") for one in measured],
        }
        if (error := verdict.error) is not None:
            record["error"] = error_record(error, "validate")
        print(json.dumps(record, indent=1))
        return
    from patchslim.console import Console
    from validate.report import print_verdict

    wide = None if sys.stdout.isatty() else 120  # a log file has no width to wrap to
    print_verdict(verdict, measured, Console(width=wide))


def main(prog: str = "validate") -> int:
    """The command line's entry point, called ``prog`` in its messages; returns the exit code."""
    description = ValidateOptions.__doc__ or ""
    return run_command(ValidateOptions, run, prog=prog, description=description, extra="edge", examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
