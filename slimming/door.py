"""What every door of the project shares: exit codes, errors that carry them, and the frame around a command line.

Free of torch and cheap to import, so that ``--help`` stays fast.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_REJECTED = 3
EXIT_UNAVAILABLE = 4
EXIT_PARITY = 5
EXIT_UNREACHABLE = 6
EXIT_INTERRUPTED = 130


class DoorError(Exception):
    """A failure the user can act on: the message says what is wrong and what to do, ``exit_code`` is the door's."""

    exit_code = 1


class UsageError(DoorError):
    """Options that contradict each other or cannot be read (exit 2)."""

    exit_code = EXIT_USAGE


class InputRejected(DoorError):  # noqa: N818 - named by what happened, as in the exit-code table
    """A model, plan, data set, ONNX file or bundle that cannot be used (exit 3)."""

    exit_code = EXIT_REJECTED


class Unavailable(DoorError):  # noqa: N818
    """A backend, target or weights that this machine does not have (exit 4)."""

    exit_code = EXIT_UNAVAILABLE


class ParityFailed(DoorError):  # noqa: N818
    """The accuracy gate was exceeded (exit 5)."""

    exit_code = EXIT_PARITY


class BudgetUnreachable(DoorError):  # noqa: N818
    """No plan meets the budget (exit 6); the message names the nearest reachable point."""

    exit_code = EXIT_UNREACHABLE


Options = TypeVar("Options")

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


def open_door(options: type[Options], main: Callable[[Options], int], *, prog: str, description: str) -> int:
    """Parse the command line into ``options``, run ``main`` and return the exit code of DESIGN.md.

    Errors go to stderr as one message; anything that is not a ``DoorError`` is a bug and keeps its traceback.
    """
    import tyro

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    parsed = tyro.cli(options, prog=prog, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        return main(parsed)
    except DoorError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_EXTRAS:
            raise
        extra = "edge" if "graph_passes" in prog else "export"
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


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it replaces ``path`` when the block succeeds, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
