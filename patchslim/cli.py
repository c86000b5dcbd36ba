"""The frame around every command line: options in, exit code out. Cheap to import, so that ``--help`` stays fast."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from patchslim.environment import let_idle_threads_sleep
from patchslim.errors import EXIT_INTERRUPTED, EXIT_USAGE, Interrupted, PatchslimError, Unavailable, UsageError, did_you_mean
from patchslim.interrupts import ignore_interrupts, raise_when_interrupted, was_interrupted
from patchslim.packages import extra_for, install_command
from patchslim.streams import lenient_streams
from patchslim.system_errors import as_error_of_ours
from patchslim.text import printable, printable_message

OptionsT = TypeVar("OptionsT")

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
    Errors go to stderr as one message, and with ``--json`` to stdout as one object. What is neither a ``PatchslimError`` nor
    something that the system refused is a bug and keeps its traceback. Whoever reads stdout or stderr may leave: the work goes
    on, and its exit code stays.
    """
    frame = _Frame(prog, extra, as_json="--json" in sys.argv[1:])
    let_idle_threads_sleep()
    with lenient_streams() as (stdout, _):
        try:
            try:
                raise_when_interrupted()
                ensure_readable(sys.argv[1:])
                code = main(frame.parse(options, sys.argv[1:], description, examples))
            except BaseException as error:
                code = frame.exit_code(error)
            ignore_interrupts()
        except KeyboardInterrupt as error:  # between the lines above
            ignore_interrupts()
            code = frame.exit_code(error)
        stdout.flush()
        if stdout.fault is not None and not isinstance(stdout.fault, BrokenPipeError):  # a pipe's reader has read enough
            print(f"{prog}: stdout cannot be written: {stdout.fault.strerror}; the rest is done", file=sys.stderr)
            code = code or EXIT_USAGE
    return code


@dataclasses.dataclass(frozen=True)
class _Frame:
    """How a command's failures are told."""

    prog: str
    extra: str
    as_json: bool

    def parse(self, options: type[OptionsT], arguments: Sequence[str], description: str, examples: Sequence[str]) -> OptionsT:
        """``parse``; what cannot be read is printed as JSON too where that was asked for."""
        if not self.as_json:
            return parse(options, arguments, prog=self.prog, description=description, examples=examples)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return parse(options, arguments, prog=self.prog, description=description, examples=examples)
        except SystemExit as end:
            if end.code == EXIT_USAGE:
                self._print_json(UsageError(_without_frame(said.getvalue()), next_step=f"see {self.prog} --help"))
            raise
        finally:
            print(said.getvalue(), end="", file=sys.stderr)

    def exit_code(self, error: BaseException) -> int:
        """Say what went wrong and return the exit code; raises ``error`` again where it is a bug."""
        if isinstance(error, SystemExit):
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error, KeyboardInterrupt) or was_interrupted():  # libraries turn the one into something else
            return self._tell(Interrupted("interrupted; nothing was half-written, and the same command resumes"))
        if (ours := as_error_of_ours(error)) is not None:
            return self._tell(ours)
        if isinstance(error, ModuleNotFoundError) and (brings := extra_for(error.name or "", self.extra)) is not None:
            return self._tell(Unavailable(f"{error.name} is not installed; install it: {install_command(brings)}"))
        if self.as_json:
            self._print_json(PatchslimError(f"{type(error).__name__}: {error}", next_step="report it: this is a bug"))
        raise error

    def _tell(self, error: PatchslimError) -> int:
        print(f"{self.prog}: {printable_message(str(error))}", file=sys.stderr)
        if self.as_json:
            self._print_json(error)
        return error.exit_code

    def _print_json(self, error: PatchslimError) -> None:
        print(json.dumps({**(error.found or {}), "error": error_record(error, self.prog)}))


def error_record(error: PatchslimError, prog: str) -> dict[str, object]:
    """An error as ``--json`` prints it: its exit code, its kind, what is wrong, and the next step."""
    otherwise = {EXIT_USAGE: f"see {prog} --help", EXIT_INTERRUPTED: "give the same command again: it resumes"}
    step = error.next_step or otherwise.get(error.exit_code)
    return {"code": error.exit_code, "kind": error.kind, "message": error.message, "next": step}


def ensure_readable(arguments: Sequence[str]) -> None:
    """Raise ``UsageError`` for what no command could work with: arguments that are no text, no working directory."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"argument {printable(argument)}: is not UTF-8", next_step="give the file another name") from None
        if "\0" in argument:
            raise UsageError(f"argument {printable(argument)}: holds a zero byte", next_step="leave it out")
    try:
        os.getcwd()
    except OSError:
        raise UsageError("the working directory is gone", next_step="cd to one that exists") from None


def _without_frame(text: str) -> str:
    """What tyro says in a box, on one line."""
    words = (word for line in text.splitlines() for word in line.strip("│╭╰╮╯─├┤ ").split())
    return " ".join(word for word in words if word.strip("─"))


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
