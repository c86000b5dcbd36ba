"""``python -m graph_passes.run model.onnx --plan plan.json -o slim.onnx``: cut a plan's tokens out of a saved ONNX model."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from slimming.door import EXIT_DONE, InputRejected, UsageError, atomic_path, open_door

if TYPE_CHECKING:
    from graph_passes.manager import SlimResult

PROG = "graph_passes.run"


@dataclass(frozen=True)
class Options:
    """Cut the tokens that a plan drops out of an exported Vision Transformer."""

    model: tyro.conf.Positional[Path | None] = None
    """The dense model: an ONNX file exported from timm, images to logits."""
    plan: Path | None = None
    """The plan (plan.json) that says which tokens each block keeps."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to write the slim model; written whole or not at all."""
    layout: Literal["split", "packed"] = "split"
    """Cut blocks with split query and key/value projections (fewest MACs) or one packed projection (fewest kernels)."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Type of the result's weights and activations; inputs and outputs stay float32."""
    passes: tuple[str, ...] = ()
    """Run these passes only, in this order."""
    list: bool = False
    """List the passes in the order in which they run, and stop."""
    explain: str | None = None
    """Explain one pass, and stop."""
    save_intermediates: Path | None = None
    """A folder for the model after every pass that changed it."""
    report: Path | None = None
    """Also write what each pass did to this file, as JSON."""
    json: bool = False
    """Print one JSON object instead of a table."""


def run(options: Options) -> int:
    """Do what the options ask; returns the exit code. Raises ``DoorError``."""
    if options.list or options.explain is not None:
        return _describe(options)
    missing = [
        name
        for name, value in (("MODEL", options.model), ("--plan", options.plan), ("--output", options.output))
        if value is None
    ]
    if options.model is None or options.plan is None or options.output is None:
        raise UsageError(f"{', '.join(missing)} missing; see --help")
    from slimming.plan import load_plan

    plan = load_plan(options.plan)
    from graph_passes.files import load_model, save_model
    from graph_passes.manager import slim

    with contextlib.redirect_stdout(sys.stderr):  # onnx-graphsurgeon logs to stdout, which is kept for the result
        model = load_model(options.model)
        try:
            result = slim(
                model,
                plan,
                layout=options.layout,
                precision=options.precision,
                passes=options.passes or None,
                save_intermediates=options.save_intermediates,
            )
        except InputRejected as error:
            raise InputRejected(f"{options.model} with plan {options.plan}: {error}") from error
        except OSError as error:
            raise UsageError(f"--save-intermediates {error.filename}: cannot be written: {error.strerror or error}") from error
    try:
        save_model(result.model, options.output)
        _report(options, result, plan.macs(options.layout), plan.dense_macs())
    except OSError as error:
        raise UsageError(f"{error.filename or options.output}: cannot be written: {error.strerror or error}") from error
    return EXIT_DONE


def _report(options: Options, result: SlimResult, macs: int, dense_macs: int) -> None:
    """Print and, where asked for, write what each pass did."""
    summary = {
        "model": str(options.model),
        "plan": str(options.plan),
        "output": str(options.output),
        "layout": options.layout,
        "precision": options.precision,
        "modified": result.modified,
        "nodes": len(result.model.graph.node),
        "plan_macs": macs,
        "dense_macs": dense_macs,
        "passes": [entry.as_dict() for entry in result.results],
    }
    if options.report is not None:
        with atomic_path(options.report) as part:
            part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(summary))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("pass", "changed", "sites")
    for entry in result.results:
        table.add_row(entry.name, "yes" if entry.modified else "no", str(entry.sites))
    Console().print(table)
    print(f"{options.output}: the plan needs {macs / 1e9:.3f} GMACs, the dense model {dense_macs / 1e9:.3f}")


def _describe(options: Options) -> int:
    """Print the passes, or one pass's explanation."""
    from graph_passes import PASSES

    chosen = [*PASSES] if options.explain is None else [options.explain]
    if unknown := [name for name in chosen if name not in PASSES]:
        raise UsageError(f"no pass named '{unknown[0]}'; there are {', '.join(PASSES)}")
    if options.json:
        print(json.dumps({name: PASSES[name].explanation for name in chosen}))
    elif options.explain is not None:
        print(PASSES[options.explain].explanation)
    else:
        for name in chosen:
            print(f"{name}: {PASSES[name].summary}")
    return EXIT_DONE


def main() -> int:
    """The command line's entry point; returns the exit code."""
    return open_door(Options, run, prog=PROG, description=Options.__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
