"""Errors that a user can act on, and the exit codes that they carry: one family for every door."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

EXIT_DONE: Final = 0
EXIT_USAGE: Final = 2
EXIT_REJECTED: Final = 3
EXIT_UNAVAILABLE: Final = 4
EXIT_PARITY: Final = 5
EXIT_UNREACHABLE: Final = 6
EXIT_INTERRUPTED: Final = 130


class PatchslimError(Exception):
    """A failure that the user can act on: the message says what is wrong, ``next_step`` what to do about it.

    ``exit_code`` is what the command ends with. ``found`` is what a door has to show all the same: ``--json`` prints it, the
    error beside it.
    """

    exit_code = 1
    found: Mapping[str, object] | None = None

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(f"{message}: {next_step}" if next_step else message)
        self._message, self._next_step = message, next_step

    @property
    def message(self) -> str:
        """What is wrong, without the next step."""
        return self._message if self._next_step else _divided(self._message)[0]

    @property
    def next_step(self) -> str:
        """What to do about it; "" where the message does not say."""
        return self._next_step or _divided(self._message)[1]

    @property
    def kind(self) -> str:
        """The name of the class below that it is one of, by which other programs know it."""
        return next((one.__name__ for one in type(self).__mro__ if one.__module__ == __name__), type(self).__name__)


class UsageError(PatchslimError):
    """Options that contradict each other or cannot be read (exit 2)."""

    exit_code = EXIT_USAGE


class InputRejected(PatchslimError):  # noqa: N818 - named by what happened, as in the exit-code table
    """A model, plan, data set, ONNX file or bundle that cannot be used (exit 3)."""

    exit_code = EXIT_REJECTED


class Unavailable(PatchslimError):  # noqa: N818
    """A backend, target or weights that this machine does not have (exit 4)."""

    exit_code = EXIT_UNAVAILABLE


class ParityFailed(PatchslimError):  # noqa: N818
    """The accuracy gate was exceeded (exit 5)."""

    exit_code = EXIT_PARITY


class BudgetUnreachable(PatchslimError):  # noqa: N818
    """No plan meets the budget (exit 6); the message names the nearest reachable point."""

    exit_code = EXIT_UNREACHABLE


class Interrupted(PatchslimError):  # noqa: N818
    """Ctrl-C or SIGTERM (exit 130)."""

    exit_code = EXIT_INTERRUPTED


#: How the last part of a message begins that says what to do.
_STEP = re.compile(
    r"(?:: |; )((?:pass|install|run|leave|use|name|see|drop|choose|give|export|save|convert|free|raise|unset|cd|add) .*)$",
    re.DOTALL,
)


def _divided(message: str) -> tuple[str, str]:
    """A message's two parts: what is wrong, and the next step that it ends with, if any."""
    found = _STEP.search(message)
    return (message, "") if found is None else (message[: found.start()], found[1])


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the names in ``known`` most like ``given``, three at most; "" where none is like it."""
    from difflib import get_close_matches

    near = get_close_matches(given, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
