"""``python -m export.run --model vit_ti --engine trt``: from PyTorch weights to a checked hand-off bundle."""

from __future__ import annotations

if __name__ == "__main__":
    from patchslim.interrupts import end_when_interrupted

    end_when_interrupted()

import dataclasses
import json
import sys
from typing import Any

from export.options import ExportOptions
from patchslim.cli import run_command
from patchslim.errors import EXIT_DONE

EXAMPLES = (
    "--model vit_ti --engine trt",
    "--model deit_s --weights deit_s.safetensors --data images/ --macs-reduction 0.3 -o bundle",
)


def run(options: ExportOptions) -> int:
    """Export, or say what an export would do; returns the exit code. Raises ``PatchslimError``."""
    if options.list_engines:
        list_engines(as_json=options.json)
        return EXIT_DONE
    if options.dry_run:
        print_dry_run(options)
        return EXIT_DONE
    from export.pipeline import GateFailed, export_bundle
    from export.summary import as_json, print_summary

    try:
        outcome = export_bundle(options)
    except GateFailed as error:  # whoever reads the output needs the numbers all the more
        error.found = as_json(error.outcome)
        if not options.json:
            print_summary(error.outcome)
        raise
    if options.json:
        print(json.dumps(as_json(outcome)))
    else:
        print_summary(outcome)
    return EXIT_DONE


def list_engines(*, as_json: bool) -> None:
    """Print which engine takes which precision on which target, and what of that works here; nothing is built."""
    from export.engines.support import engine_support

    rows = [dataclasses.asdict(row) for row in engine_support()]
    if as_json:
        print(json.dumps({"engines": rows}))
        return
    from export.engines.table import print_engines
    from patchslim.console import Console

    print_engines(rows, Console(highlight=False, width=None if sys.stdout.isatty() else 120))


def print_dry_run(options: ExportOptions) -> None:
    """Check everything that can be checked without working, and print what would be done."""
    from export.begin import describe

    described: dict[str, Any] = describe(options)
    if options.json:
        print(json.dumps(described))
        return
    from rich.markup import escape
    from rich.table import Table

    from patchslim.console import Console

    table = Table.grid(padding=(0, 2))
    for name, value in described.items():
        if name == "engines":
            for one in value:
                said = f"{one['backend']} for {' '.join(one['targets'])}, {one['precision']}, {one['layout']} qkv"
                table.add_row(f"engine {one['engine']}", escape(said))
        elif name == "left_out":
            for engine, reason in value.items():
                table.add_row(f"left out {engine}", escape(reason))
        else:
            table.add_row(name, escape(" ".join(map(str, value)) if isinstance(value, list) else str(value)))
    Console(highlight=False).print(table)


def main(prog: str = "python -m export.run") -> int:
    """The command line's entry point, called ``prog`` in its messages; returns the exit code."""
    return run_command(ExportOptions, run, prog=prog, description=ExportOptions.__doc__ or "", examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
