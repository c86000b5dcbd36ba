"""Exit codes, the errors that carry them, and the frame around ``validate``'s command line.

The same meanings as at every door of the project, kept apart on purpose: ``validate`` runs where nothing else of ours is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

EXIT_DONE: Final = 0
EXIT_USAGE: Final = 2
EXIT_REJECTED: Final = 3
EXIT_UNAVAILABLE: Final = 4
EXIT_PARITY: Final = 5
EXIT_INTERRUPTED: Final = 130


class DoorError(Exception):
    """A failure the user can act on: the message says what is wrong and what to do, ``exit_code`` is the door's."""

    exit_code = 1


class UsageError(DoorError):
    """Options that contradict each other or cannot be read (exit 2)."""

    exit_code = EXIT_USAGE


class InputRejected(DoorError):  # noqa: N818 - named by what happened, as in the exit-code table
    """A bundle, ONNX file, image folder or report that cannot be used (exit 3)."""

    exit_code = EXIT_REJECTED


class Unavailable(DoorError):  # noqa: N818
    """A runtime or execution provider that this machine does not have (exit 4)."""

    exit_code = EXIT_UNAVAILABLE


class ParityFailed(DoorError):  # noqa: N818
    """The accuracy gate, or a declared tolerance, was exceeded (exit 5)."""

    exit_code = EXIT_PARITY


Options = TypeVar("Options")


def open_door(options: type[Options], main: Callable[[Options], int], *, prog: str, description: str) -> int:
    """Parse the command line into ``options``, run ``main`` and return its exit code.

    Errors go to stderr as one message; anything that is not a ``DoorError`` is a bug and keeps its traceback.
    """
    import tyro

    signal.signal(signal.SIGTERM, _interrupt)
    parsed = tyro.cli(options, prog=prog, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        return main(parsed)
    except DoorError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("PIL", "onnx", "onnxruntime"):
            raise
        print(f'{prog}: {error.name} is not installed; install it: pip install "patchslim[edge]"', file=sys.stderr)
        return EXIT_UNAVAILABLE
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _interrupt(signum: int, frame: object) -> None:
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
