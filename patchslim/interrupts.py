"""Ctrl-C and SIGTERM at every moment of a command: exit code 130, a message, and no traceback. Imports next to nothing."""

from __future__ import annotations

import os
import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: As ``patchslim.errors.EXIT_INTERRUPTED``; this module is imported before anything else is.
_EXIT_INTERRUPTED = 130

_interrupted = False


def end_when_interrupted() -> None:
    """End the process at once on Ctrl-C or SIGTERM: for the time in which modules load and nothing has been begun.

    The first line of every door. An exception would not do: libraries swallow it while they are imported.
    """
    for number in SIGNALS:
        signal.signal(number, _end)


def raise_when_interrupted() -> None:
    """Raise ``KeyboardInterrupt`` on Ctrl-C or SIGTERM: for the time in which there may be something to clean up."""
    global _interrupted
    _interrupted = False
    for number in SIGNALS:
        signal.signal(number, _raise)


def ignore_interrupts() -> None:
    """Take no notice of Ctrl-C or SIGTERM, and forget earlier ones: for the time in which all is done and the process ends."""
    global _interrupted
    _interrupted = False
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # CPython remembers a KeyboardInterrupt that left a text given to ``exec``, of which libraries have many, and kills its own
    # process by SIGINT at the end, whatever code it was to exit with; the next such text makes it forget.
    eval("0")


def was_interrupted() -> bool:
    """Whether Ctrl-C or SIGTERM came while a command was running."""
    return _interrupted


def raise_if_interrupted() -> None:
    """Raise the ``KeyboardInterrupt`` of an earlier Ctrl-C again: CPython drops one that falls into a fork or a finaliser."""
    if _interrupted:
        raise KeyboardInterrupt


def _raise(signum: int, frame: object) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _end(signum: int, frame: object) -> None:
    try:
        os.write(2, b"interrupted; nothing was begun\n")
    finally:
        os._exit(_EXIT_INTERRUPTED)
