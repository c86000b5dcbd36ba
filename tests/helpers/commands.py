"""A command line run in the test's own process, which has imported torch already: a process of its own takes seconds to."""

from __future__ import annotations

import contextlib
import io
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from unittest import mock


def door_here(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run ``[python, "-m", module, ...]`` as its process would, and return its exit code and what it wrote.

    For what a door says and with which exit code. Signals, output that is not Python's and an environment that is read on
    import need a process.
    """
    _, dash_m, module, *rest = arguments
    assert dash_m == "-m"
    code, stdout, stderr = 0, io.StringIO(), io.StringIO()
    with (
        kept_signals(),
        warnings.catch_warnings(),
        mock.patch.object(sys, "argv", [module, *rest]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        warnings.filterwarnings("ignore", message=".* found in sys.modules", category=RuntimeWarning)  # runpy's own
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def kept_signals() -> Iterator[None]:
    """A door handles Ctrl-C in its own way; afterwards pytest does again."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
