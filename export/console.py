"""``patchslim COMMAND ...``: every door under one name, and what this machine can do. Cheap to import.

A command's module is imported when that command is called, so that ``patchslim --help`` needs nothing but Python.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from patchslim.errors import EXIT_DONE, EXIT_USAGE, did_you_mean
from patchslim.interrupts import end_when_interrupted
from patchslim.packages import DISTRIBUTION, installed_version
from patchslim.streams import lenient_streams
from patchslim.text import printable


@dataclass(frozen=True)
class Command:
    """A command: the module whose ``main(prog)`` runs it, and what it does, in one line."""

    module: str
    summary: str


COMMANDS = {
    "export": Command("export.run", "From PyTorch weights to a checked bundle: ONNX, engines, parity report."),
    "slim": Command("slimming.run", "Find which tokens each block can do without: a plan, fitted weights and a page."),
    "cut": Command("graph_passes.run", "Cut the tokens that a plan drops out of an ONNX file. Needs no PyTorch."),
    "build": Command("export.build", "Build a bundle's TensorRT engine on the device that it is for. Needs no PyTorch."),
    "validate": Command("validate.run", "Check a bundle whole, and measure it on images. Needs no PyTorch."),
    "diff": Command("validate.diff", "Say in words how two bundles differ. Needs no PyTorch."),
    "doctor": Command("export.doctor", "Say what is installed, what works here, and what to install for the rest."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command's entry point; returns the exit code."""
    end_when_interrupted()
    with lenient_streams():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        print(usage(), file=sys.stderr)
        return EXIT_USAGE
    name, *rest = given
    if name in ("-h", "--help"):
        print(usage())
        return EXIT_DONE
    if name in ("-V", "--version"):
        print(DISTRIBUTION, installed_version(DISTRIBUTION) or "(not installed: run from a checkout)")
        return EXIT_DONE
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        print(f"patchslim: no command {printable(name)}{hint}", file=sys.stderr)
        return EXIT_USAGE
    prog = f"patchslim {name}"
    sys.argv = [prog, *rest]  # what a door reads, and writes into its page
    code: int = import_module(COMMANDS[name].module).main(prog=prog)
    return code


def usage() -> str:
    """The commands, one line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: patchslim [-h] [--version] COMMAND ...",
            "",
            "Slim, export, check and hand over Vision Transformers.",
            "",
            "Commands:",
            *lines,
            "",
            "patchslim COMMAND --help lists the options of a command.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
