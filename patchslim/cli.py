"""The frame around every command line: options in, exit code out. Cheap to import, so that ``--help`` stays fast."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from patchslim.errors import EXIT_INTERRUPTED, EXIT_UNAVAILABLE, PatchslimError

OptionsT = TypeVar("OptionsT")

#: Packages that an extra brings: without one of them a door says what to install.
_OF_EXTRAS = frozenset(
    [
        "PIL",
        "accelerate",
        "jinja2",
        "matplotlib",
        "onnx",
        "onnx_graphsurgeon",
        "onnxruntime",
        "onnxscript",
        "safetensors",
        "sklearn",
        "timm",
        "torch",
    ]
)


def run_command(options: type[OptionsT], main: Callable[[OptionsT], int], *, prog: str, description: str) -> int:
    """Parse the command line into ``options``, run ``main`` and return the exit code.

    Errors go to stderr as one message; anything that is not a ``PatchslimError`` is a bug and keeps its traceback.
    """
    import tyro

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    parsed = tyro.cli(options, prog=prog, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        return main(parsed)
    except PatchslimError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_EXTRAS:
            raise
        extra = "edge" if prog.startswith(("validate", "graph_passes")) else "export"
        print(f'{prog}: {error.name} is not installed; install it: pip install "patchslim[{extra}]"', file=sys.stderr)
        return EXIT_UNAVAILABLE
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; nothing was half-written, and the same command resumes", file=sys.stderr)
        return EXIT_INTERRUPTED


_interrupted = False


def _interrupt(signum: int, frame: object) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """Raise the ``KeyboardInterrupt`` of an earlier Ctrl-C again: CPython drops one that falls into a fork or a finaliser."""
    if _interrupted:
        raise KeyboardInterrupt
