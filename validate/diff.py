"""``python -m validate.diff A B``: two bundles explained in words: what differs, and what that means. Needs no PyTorch."""

from __future__ import annotations

if __name__ == "__main__":
    from patchslim.interrupts import end_when_interrupted

    end_when_interrupted()

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from patchslim.cli import run_command
from patchslim.errors import EXIT_DONE, EXIT_PARITY

EXAMPLES = ("bundles/vit_ti-ort bundles/vit_ti-trt", "before/ after/ --json")


@dataclasses.dataclass(frozen=True)
class DiffOptions:
    """Say in words how two bundles differ: model, weights, plan, cost, accuracy, engine, tools, files.

    Exit code 0 where they are equal, 5 where they differ.
    """

    first: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """A bundle's folder."""
    second: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """Another bundle's folder."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(options: DiffOptions) -> int:
    """Compare the bundles and print what differs; returns 0 where nothing does, else 5.

    Raises ``InputRejected`` where one of them is broken: as ``validate.run`` finds, but that no model is run.
    """
    from validate.bundle_differences import compare_bundles

    found = compare_bundles(options.first, options.second)
    code = EXIT_PARITY if found.differences else EXIT_DONE
    if options.json:
        import json

        print(json.dumps(found.model_dump(mode="json") | {"equal": not code, "exit_code": code}, indent=1))
        return code
    from rich.markup import escape

    from patchslim.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    topic = ""
    for one in found.differences:
        if one.topic != topic:
            console.print(f"[bold]{escape(one.topic)}[/]")
            topic = one.topic
        console.print(f"  {escape(one.said)}", soft_wrap=True)
    if not code:
        console.print("the bundles are equal, file by file" if found.same_files else "the bundles say the same")
    return code


def main(prog: str = "python -m validate.diff") -> int:
    """The command line's entry point, called ``prog`` in its messages; returns the exit code."""
    description = DiffOptions.__doc__ or ""
    return run_command(DiffOptions, run, prog=prog, description=description, extra="edge", examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
