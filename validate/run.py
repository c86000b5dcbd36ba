"""``python -m validate.run BUNDLE``: check a bundle whole, on any device, with the ``edge`` extra alone."""

from __future__ import annotations

if __name__ == "__main__":
    from patchslim.interrupts import end_when_interrupted

    end_when_interrupted()

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from patchslim.cli import run_command
from patchslim.errors import ParityFailed, UsageError

if TYPE_CHECKING:
    from patchslim.arrays import Array
    from validate.check import BundleVerdict
    from validate.manifest import Manifest, Rung

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
    """A folder of images, one subfolder per class, to measure top-1 and top-5 on as well."""
    batch: int = 8
    """Images per run when --images is measured."""


@dataclasses.dataclass(frozen=True)
class EngineGroup:
    """How ONNX Runtime runs."""

    provider: str = "CPUExecutionProvider"
    """ONNX Runtime's execution provider."""
    threads: int = 0
    """Threads of ONNX Runtime; 0 leaves the choice to it."""


@dataclasses.dataclass(frozen=True)
class OutputGroup:
    """What is printed."""

    json: bool = False
    """Print the verdict as one JSON object instead of tables."""


@dataclasses.dataclass(frozen=True)
class ValidateOptions(OutputGroup, EngineGroup, ImageGroup, BundleGroup):
    """Check a patchslim bundle whole: digests, contracts and the ONNX files' answers to the golden inputs."""


def run(options: ValidateOptions) -> int:
    """Check the bundle, print what was found, and return the exit code: 0 right, 3 broken, 5 wrong answers."""
    if options.threads < 0 or options.batch < 1:
        raise UsageError("--threads must not be negative, --batch must be at least 1")
    from rich.console import Console

    from validate.check import check_bundle

    errors = Console(stderr=True)
    with errors.status("") as status:
        verdict = check_bundle(
            options.bundle, provider=options.provider, threads=options.threads, progress=lambda what: status.update(what)
        )
        measured = []
        if options.images is not None and verdict.passed and verdict.manifest is not None:
            measured = measure(options.bundle, verdict.manifest, options)
    _print(verdict, measured, options)
    for fault in verdict.faults:
        print(f"validate: {fault}", file=sys.stderr)
    for one in measured:
        if one.non_finite:
            raise ParityFailed(
                f"{options.bundle}: {one.stage}: {one.non_finite} logits on {options.images} are NaN or infinite"
            )
    return verdict.exit_code


def measure(folder: Path, manifest: Manifest, options: ValidateOptions) -> list[Rung]:
    """Top-1 and top-5 over ``options.images`` of every ONNX file that runs in ONNX Runtime.

    Drop, agreement and errors are against the first of them; a rung with a NaN or infinite logit has failed.
    """
    import numpy as np

    from patchslim.ort_runner import OrtRunner
    from patchslim.runner import infer_in_batches
    from validate import parity
    from validate.images import batches, list_images

    assert options.images is not None
    images = list_images(options.images, manifest)
    records = [record for record in manifest.onnx if record.max_error is not None]
    runners = [OrtRunner(folder / r.path, provider=options.provider, threads=options.threads) for r in records]
    logits: list[list[Array]] = [[] for _ in records]
    targets = []
    for tensors, classes in batches(images, manifest.preprocessing, options.batch):
        targets.append(classes)
        for runner, parts in zip(runners, logits, strict=True):
            parts.append(infer_in_batches(runner, tensors, options.batch))
    whole = [np.concatenate(parts) for parts in logits]
    rungs = [parity.rung(records[0].stage, whole[0], np.concatenate(targets))]
    for record, one in zip(records[1:], whole[1:], strict=True):
        rungs.append(parity.rung(record.stage, one, np.concatenate(targets), whole[0], whole[0], compared_to=records[0].stage))
    return [one.model_copy(update={"status": "failed" if one.non_finite else "passed"}) for one in rungs]


def _print(verdict: BundleVerdict, measured: list[Rung], options: ValidateOptions) -> None:
    if options.json:
        import json

        record = verdict.model_dump(mode="json") | {
            "passed": verdict.passed,
            "exit_code": verdict.exit_code,
            "measured": [one.model_dump(mode="json") for one in measured],
        }
        print(json.dumps(record, indent=1))
        return
    from rich.console import Console

    from validate.report import print_verdict

    wide = None if sys.stdout.isatty() else 120  # a log file has no width to wrap to
    print_verdict(verdict, measured, Console(width=wide))


def main(prog: str = "validate") -> int:
    """The command line's entry point, called ``prog`` in its messages; returns the exit code."""
    description = ValidateOptions.__doc__ or ""
    return run_command(ValidateOptions, run, prog=prog, description=description, extra="edge", examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
