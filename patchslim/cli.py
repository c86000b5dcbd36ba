"""The frame around every command line: options in, exit code out. Cheap to import, so that ``--help`` stays fast."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from patchslim.errors import EXIT_INTERRUPTED, EXIT_UNAVAILABLE, EXIT_USAGE, PatchslimError, did_you_mean
from patchslim.packages import extra_for, install_command

OptionsT = TypeVar("OptionsT")

#: As a shell reports a process that SIGPIPE ended.
EXIT_BROKEN_PIPE = 128 + 13

#: An options class may be put together from classes of this name's ending, one for each group of its ``--help``.
GROUP = "Group"


def run_command(
    options: type[OptionsT],
    main: Callable[[OptionsT], int],
    *,
    prog: str,
    description: str,
    extra: str = "export",
    examples: Sequence[str] = (),
) -> int:
    """Parse the command line into ``options``, run ``main`` and return the exit code.

    ``extra`` is the extra of the distribution that the command needs, ``examples`` are its arguments as ``--help`` shows them.
    Errors go to stderr as one message; anything that is not a ``PatchslimError`` is a bug and keeps its traceback.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    parsed = parse(options, sys.argv[1:], prog=prog, description=description, examples=examples)
    try:
        code = main(parsed)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as in ``patchslim doctor | head``: whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again when it flushes at exit
        return EXIT_BROKEN_PIPE
    except PatchslimError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        brings = extra_for(error.name or "", extra)
        if brings is None:
            raise
        print(f"{prog}: {error.name} is not installed; install it: {install_command(brings)}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; nothing was half-written, and the same command resumes", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse(
    options: type[OptionsT], arguments: Sequence[str], *, prog: str, description: str, examples: Sequence[str] = ()
) -> OptionsT:
    """Parse ``arguments`` into ``options``; ends the process with exit code 2 where they cannot be read, after saying why.

    ``--help`` shows the options in groups: one for each base class of ``options`` whose name ends in ``Group``, titled by that
    name and described by its docstring.
    """
    import tyro

    if examples:
        description = "\n".join([description, "", "Examples:", *(f"  {prog} {example}" for example in examples)])
    groups = groups_of(options)
    # One nested field a group is how tyro puts options into groups; the names of the options stay as they are.
    nested: Any = options if not groups else dataclasses.make_dataclass(options.__name__, [*groups.items()])
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    try:
        parsed: Any = tyro.cli(nested, prog=prog, description=description, args=arguments, config=markers)
    except SystemExit as end:
        if end.code == EXIT_USAGE:
            for hint in _misspelt_choices(options, arguments):
                print(f"{prog}: {hint}", file=sys.stderr)
        raise
    if not groups:
        return typing.cast(OptionsT, parsed)
    return options(**{name: value for title in groups for name, value in vars(getattr(parsed, title)).items()})


def groups_of(options: type[Any]) -> dict[str, type[Any]]:
    """The groups that an options class is put together from, by title, in the order of its fields."""
    found = [base for base in reversed(options.__mro__) if base.__name__.endswith(GROUP)]
    return {base.__name__.removesuffix(GROUP).lower(): base for base in found}


def _misspelt_choices(options: type[Any], arguments: Sequence[str]) -> Iterator[str]:
    """For every value given to an option with choices that is none of them, but like one: that one."""
    hints = typing.get_type_hints(options)
    for name, hint in hints.items():
        flag, choices = f"--{name.replace('_', '-')}", [*_choices(hint)]
        for given, following in zip(arguments, [*arguments, ""][1:], strict=True):
            option, equals, value = given.partition("=")
            value = value if equals else following
            if choices and option.replace("_", "-") == flag and value not in choices and (hint := did_you_mean(value, choices)):
                yield f"{flag} {value}{hint}"


def _choices(hint: Any) -> Iterator[str]:
    """The words that an option of this type takes."""
    if typing.get_origin(hint) is Literal:
        yield from map(str, typing.get_args(hint))
        return
    for part in typing.get_args(hint):
        yield from _choices(part)


_interrupted = False


def _interrupt(signum: int, frame: object) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """Raise the ``KeyboardInterrupt`` of an earlier Ctrl-C again: CPython drops one that falls into a fork or a finaliser."""
    if _interrupted:
        raise KeyboardInterrupt
