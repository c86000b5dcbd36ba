"""``python -m slimming.run -o plan.json``: find which tokens each block of a ViT can do without."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from slimming.door import EXIT_DONE, UsageError, open_door
from slimming.options import ModelOptions
from slimming.plan import Layout, SlimPlan


@dataclass(frozen=True)
class Options(ModelOptions):
    """Find a slim plan for a Vision Transformer: which tokens each block keeps, from the last block down."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("plan.json")
    """Where to write the plan; written whole or not at all."""
    layout: Layout = "split"
    """How the cut projections will be laid, for the MAC count: split (ONNX Runtime) or packed (TensorRT)."""
    json: bool = False
    """Print one JSON object on stdout instead of a table."""

    def check_output(self) -> None:
        """Raise ``UsageError``, before the search rather than after it, where the plan could not be written."""
        above = next(parent for parent in self.output.absolute().parents if parent.exists())
        if self.output.is_dir() or not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise UsageError(f"--output {self.output}: not a file that can be written")


def run(options: Options) -> int:
    """Find and save the plan; returns the exit code. Raises ``DoorError``."""
    from slimming.progress import Reporter
    from slimming.session import find, open_session

    options.check_output()
    reporter = Reporter()
    session = open_session(options)
    reporter.say(f"{options.model}: searching on {len(session.calibration)} images of {session.calibration.address}")
    with reporter.stages() as progress:
        plan = find(options, session, options.layout, progress)
    try:
        plan.save(options.output)
    except OSError as error:
        raise UsageError(f"--output {options.output}: cannot be written: {error.strerror or error}") from error
    summary = summarise(plan, options.layout) | {"plan": str(options.output)}
    if options.json:
        print(json.dumps(summary))
    else:
        _print(plan, options, summary)
    return EXIT_DONE


def summarise(plan: SlimPlan, layout: Layout) -> dict[str, object]:
    """Tokens per block and MACs of a plan."""
    dense, slim = plan.dense_macs(), plan.macs(layout)
    return {
        "tokens_per_block": plan.counts,
        "macs": {"dense": dense, "slim": slim, "reduction": 1 - slim / dense, "layout": layout},
        "tolerance": plan.origin.tolerance,
    }


def _print(plan: SlimPlan, options: Options, summary: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("block", "tokens kept", title=f"{plan.model}, {plan.mode}, of {plan.tokens} tokens")
    for block, count in enumerate(plan.counts, start=1):
        table.add_row(str(block), str(count))
    Console().print(table)
    dense, slim = plan.dense_macs(), plan.macs(options.layout)
    print(f"{options.output}: {slim / 1e9:.3f} of {dense / 1e9:.3f} GMACs, {1 - slim / dense:.1%} removed")


def main() -> int:
    """The command line's entry point; returns the exit code."""
    return open_door(Options, run, prog="python -m slimming.run", description=Options.__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
