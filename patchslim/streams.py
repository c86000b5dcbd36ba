"""Standard output and error that never stop the work: whoever reads may leave, and the disk under a log may fill."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, cast


@contextlib.contextmanager
def lenient_streams() -> Iterator[tuple[LenientStream, LenientStream]]:
    """Have standard output and error be lenient for the block; yields both. They are flushed when it ends."""
    stdout, stderr = LenientStream(sys.stdout), LenientStream(sys.stderr)
    with contextlib.redirect_stdout(cast(IO[str], stdout)), contextlib.redirect_stderr(cast(IO[str], stderr)):
        try:
            yield stdout, stderr
        finally:
            stdout.flush()
            stderr.flush()


class LenientStream:
    """A text stream whose first failure is kept in ``fault``; what is written after that goes nowhere.

    The work and its exit code matter more than the text about them: a bundle is published, and a broken one is called broken,
    whether somebody reads on or not.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream  # None: closed when the process began
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no reason to stop
        self.fault: OSError | None = None

    def write(self, text: str) -> int:
        """Write ``text``; returns its length."""
        with self._kept():
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of ``lines``."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write out what is buffered."""
        with self._kept():
            if self._stream is not None:
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        if self._stream is None:
            raise AttributeError(name)
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Whether a terminal shows it."""
        return self._stream is not None and self._stream.isatty()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fault = self.fault or error
            if self._stream is not None:
                with contextlib.suppress(OSError, ValueError):  # else Python complains when it flushes at exit
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
