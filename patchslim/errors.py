"""Errors that a user can act on, and the exit codes that they carry: one family for every door."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

EXIT_DONE: Final = 0
EXIT_USAGE: Final = 2
EXIT_REJECTED: Final = 3
EXIT_UNAVAILABLE: Final = 4
EXIT_PARITY: Final = 5
EXIT_UNREACHABLE: Final = 6
EXIT_INTERRUPTED: Final = 130


class PatchslimError(Exception):
    """A failure that the user can act on: the message says what is wrong and what to do next.

    ``exit_code`` is what the command ends with.
    """

    exit_code = 1


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


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the names in ``known`` most like ``given``, three at most; "" where none is like it."""
    from difflib import get_close_matches

    near = get_close_matches(given, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
