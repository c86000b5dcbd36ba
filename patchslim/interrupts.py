"""Ctrl-C and SIGTERM at every moment of a command: exit code 130, a message, and no traceback. Imports next to nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: As ``patchslim.errors.EXIT_INTERRUPTED``; this module is imported before anything else is.
_EXIT_INTERRUPTED = 130

_interrupted = False
_quiet = False  # since an interrupt, to the end of the process or the next command: what libraries make of one is no news
_logging_before: int | None = None  # the level up to which logging was disabled before that
_report: Callable[[Any], object] = sys.unraisablehook
#: An interrupt that comes while a module is imported waits for its end: an exception in the C++ of one (torch's) aborts the
#: process. It looks again after so many seconds, so often at most.
_AGAIN, _MOST = 0.02, 500
_waits = 0


def end_when_interrupted() -> None:
    """End the process at once on Ctrl-C or SIGTERM: for the time in which modules load and nothing has been begun.

    The first line of every door. An exception would not do: libraries swallow it while they are imported.
    """
    for number in SIGNALS:
        signal.signal(number, _end)


def raise_when_interrupted() -> None:
    """Raise ``KeyboardInterrupt`` on Ctrl-C or SIGTERM: for the time in which there may be something to clean up.

    While a module is imported it is raised behind that.
    """
    global _interrupted, _quiet, _report
    _interrupted = _quiet = False
    _wait_no_more()
    if sys.unraisablehook is not _report_unraisable:
        _report, sys.unraisablehook = sys.unraisablehook, _report_unraisable
    for number in SIGNALS:
        signal.signal(number, _raise)


def ignore_interrupts() -> None:
    """Take no notice of Ctrl-C or SIGTERM, and forget earlier ones: for the time in which all is done and the process ends."""
    global _interrupted
    _interrupted = False
    _wait_no_more()
    _log_again()
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


def _raise(signum: int, frame: FrameType | None) -> None:
    global _interrupted, _quiet, _waits
    _interrupted = _quiet = True
    _stop_logging()
    if _importing(frame) and _waits < _MOST and hasattr(signal, "setitimer"):
        _waits += 1
        signal.signal(signal.SIGALRM, _raise)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        return
    _wait_no_more()
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _wait_no_more() -> None:
    global _waits
    if _waits:
        signal.setitimer(signal.ITIMER_REAL, 0)
    _waits = 0


def _stop_logging() -> None:
    """Libraries log the interrupt that passes through them as an error of theirs, with its traceback."""
    global _logging_before
    logging = sys.modules.get("logging")
    if logging is not None and _logging_before is None:
        _logging_before = logging.root.manager.disable
        logging.disable()


def _log_again() -> None:
    global _logging_before
    if _logging_before is not None:
        sys.modules["logging"].disable(_logging_before)
        _logging_before = None


def _report_unraisable(found: Any) -> None:
    """Report an exception in a finaliser, unless it comes of an interrupt: objects that were half made then, say."""
    if not _quiet:
        _report(found)


def _end(signum: int, frame: object) -> None:
    try:
        os.write(2, b"interrupted; nothing was begun\n")
    finally:
        os._exit(_EXIT_INTERRUPTED)
