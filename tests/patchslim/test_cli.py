"""The command line's frame: options in groups, nearest names, exit codes, and the extra that brings a missing package."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from export.options import ExportOptions
from graph_passes.run import PassOptions
from patchslim.cli import groups_of, parse, run_command
from patchslim.errors import InputRejected, did_you_mean
from patchslim.packages import DISTRIBUTION, PACKAGES, extra_for, install_command, installed_version
from slimming.run import SlimmingOptions
from tests.helpers.commands import kept_signals
from validate.run import ValidateOptions

ROOT = Path(__file__).parents[2]
DOORS: list[tuple[type[Any], list[str]]] = [
    (ExportOptions, []),
    (SlimmingOptions, []),
    (PassOptions, []),
    (ValidateOptions, ["bundle"]),
]
#: The groups that ``--help`` shows of each door.
GROUPS = {
    ExportOptions: ["model", "image", "budget", "fitting", "plan", "engine", "gate", "output"],
    SlimmingOptions: ["model", "image", "budget", "fitting", "graph", "measure", "output"],
    PassOptions: ["model", "cut", "image", "passes", "output"],
    ValidateOptions: ["bundle", "image", "engine", "trust", "output"],
}


@dataclasses.dataclass(frozen=True)
class ShapeGroup:
    """How large."""

    width_px: int = 3
    """Pixels across."""


@dataclasses.dataclass(frozen=True)
class ColourGroup:
    """Which colour."""

    colour: Literal["red", "green", "dark-blue"] | None = None
    """Of the paint."""
    coats: int | Literal["all"] = "all"
    """How many."""


@dataclasses.dataclass(frozen=True)
class Paint(ColourGroup, ShapeGroup):
    """Paint."""


def command(main: Callable[[Paint], int], *arguments: str, extra: str = "export") -> int:
    with kept_signals(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["paint", *arguments])
        return run_command(Paint, main, prog="paint", description="Paint.", extra=extra, examples=["--colour red"])


def shown(options: type[Any], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        parse(options, ["--help"], prog="paint", description="Paint.", examples=["--colour red", "--width-px 4"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("options", "needed"), DOORS)
def test_defaults_are_those_of_the_options_class(options: type[Any], needed: list[str]) -> None:
    assert parse(options, needed, prog="door", description="") == options(*map(Path, needed))


@pytest.mark.parametrize(("options", "needed"), DOORS)
def test_every_option_is_in_one_group(options: type[Any], needed: list[str]) -> None:
    del needed
    groups = groups_of(options)
    assert list(groups) == GROUPS[options]
    grouped = [field.name for group in groups.values() for field in dataclasses.fields(group)]
    assert grouped == [field.name for field in dataclasses.fields(options)]


def test_help_shows_the_examples_and_then_each_group_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(Paint, capsys)
    order = [
        "Paint.",
        "Examples:",
        "paint --colour red\n",
        "paint --width-px 4",
        "shape options",
        "How large.",
        "--width-px INT",
    ]
    order += ["Pixels across. (default: 3)", "colour options", "Which colour.", "--colour", "Of the paint."]
    for part in order:
        assert part in text  # in what follows the part before
        text = text[text.index(part) + len(part) :]


def test_values_reach_the_options_class_under_their_own_names() -> None:
    arguments = ["--colour", "dark-blue", "--width-px", "7", "--coats", "2"]
    assert parse(Paint, arguments, prog="paint", description="") == Paint(width_px=7, colour="dark-blue", coats=2)
    assert parse(Paint, ["--width_px=7"], prog="paint", description="") == Paint(width_px=7)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--colour", "gren"], "paint: --colour gren; did you mean green?"),
        (["--colour=darkblue"], "paint: --colour darkblue; did you mean dark-blue?"),
        (["--width-px", "2", "--coats", "al"], "paint: --coats al; did you mean all?"),
    ],
)
def test_a_misspelt_choice_gets_the_nearest(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(Paint, arguments, prog="paint", description="")
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == hint


def test_a_value_like_none_of_the_choices_gets_no_advice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Paint, ["--colour", "xyzzy"], prog="paint", description="")
    assert "did you mean" not in capsys.readouterr().err


def test_a_misspelt_option_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(Paint, ["--color", "red"], prog="paint", description="")
    assert end.value.code == 2
    assert "--colour" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "known", "expected"),
    [
        ("vit_tii", ["vit_ti", "vit_s"], "; did you mean vit_ti"),
        ("abacus", ["vit_ti", "vit_s"], ""),
        ("", ["vit_ti"], ""),
    ],
)
def test_did_you_mean(given: str, known: list[str], expected: str) -> None:
    assert did_you_mean(given, known).startswith(expected)
    assert bool(did_you_mean(given, known)) == bool(expected)


def test_an_error_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def main(options: Paint) -> int:
        raise InputRejected("wall: not a wall")

    assert command(main) == 3
    assert capsys.readouterr().err == "paint: wall: not a wall\n"


def test_a_reader_that_stops_reading_is_no_bug() -> None:
    command = [sys.executable, "-m", "graph_passes.run", "--list"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert "Traceback" not in said
    assert "BrokenPipeError" not in said


@pytest.mark.parametrize(
    ("module", "extra", "brings"),
    [
        ("onnx", "edge", "edge"),
        ("onnx", "export", "export"),
        ("torch", "edge", "export"),
        ("torch.nn", "export", "export"),
        ("PIL.Image", "edge", "edge"),
        ("openvino", "export", "openvino"),
        ("datasets", "export", "readers"),
    ],
)
def test_a_missing_package_names_the_extra_that_brings_it(
    module: str, extra: str, brings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(options: Paint) -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert command(main, extra=extra) == 4
    assert f"{module} is not installed; install it: {install_command(brings)}" in capsys.readouterr().err


def test_a_missing_module_that_no_extra_brings_is_a_bug() -> None:
    def main(options: Paint) -> int:
        raise ModuleNotFoundError("No module named 'patchslim.nowhere'", name="patchslim.nowhere")

    with pytest.raises(ModuleNotFoundError):
        command(main)


def test_the_table_of_packages_is_the_extras_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == DISTRIBUTION
    asked = {
        (extra, requirement.partition(">")[0].partition("!")[0])
        for extra, requirements in project["optional-dependencies"].items()
        for requirement in requirements
    }
    assert asked == {(extra, package.distribution) for package in PACKAGES for extra in package.extras}


def test_versions_are_read_from_metadata() -> None:
    assert installed_version("pytest") == pytest.__version__
    assert installed_version("no-such-distribution") is None
    assert extra_for("no_such_module", "edge") is None


def test_what_to_install_is_in_the_checkout_since_no_index_has_it() -> None:
    assert install_command("edge") == 'pip install ".[edge]"'
    assert install_command("export") == 'pip install ./weights ".[export]"'


def test_every_choice_of_a_door_is_spelt_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    from patchslim.choices import ScoreName

    text = shown(SlimmingOptions, capsys)
    assert all(name in text for name in typing.get_args(ScoreName))


def test_what_tables_show_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    from patchslim.console import Console

    table = Table("name", title="of \x1b]0;others\x07")
    table.add_row("a\x1b[31mb")
    console = Console(force_terminal=True, color_system="standard", width=60, highlight=False)
    console.print(table)
    console.print("[red]plain\x1b[0m[/]")
    told = capsys.readouterr().out
    assert "\x1b[31mplain\\x1b[0m\x1b[0m" in told  # its own colours stay
    assert "a\\x1b[31mb" in told
    assert "\x1b]0;" not in told
    assert "\x07" not in told
