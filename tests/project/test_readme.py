"""The README keeps its word: commands, doors, options and Python examples are those of the code."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.commands import door_here

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOORS = ("export.run", "slimming.run", "graph_passes.run", "validate.run")
MODULES = sorted(set(re.findall(r"python -m ([a-z0-9_.]+)", README)))
COMMANDS = re.findall(r"python -m ([a-z0-9_.]+)([^\n`]*)", README)
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


@functools.cache
def options_of(module: str) -> frozenset[str]:
    """Every option that a module's ``--help`` names. A door has its own process; what imports torch before that does not."""
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", module, "--help"]
    if module in DOORS:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    else:
        with mock.patch.dict(os.environ, environment):
            done = door_here(command)
    assert done.returncode == 0, f"{module}: {done.stderr}"
    return frozenset(OPTION.findall(done.stdout))


def sections() -> Iterator[tuple[str, str]]:
    """Heading and text of each section."""
    for part in re.split(r"^#+ ", README, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        yield heading, text


@pytest.mark.parametrize(
    "command",
    ["pip install uv && uv run python -m export.run --model vit_ti --engine trt", "pip install uv && uv run pytest"],
)
def test_the_set_up_command_is_there_verbatim(command: str) -> None:
    assert command in README.splitlines()


def test_every_door_has_its_section() -> None:
    headings = [heading for heading, _ in sections()]
    assert [f"`python -m {door}`" for door in DOORS] == [heading for heading in headings if "python -m" in heading]


@pytest.mark.parametrize("module", MODULES)
def test_a_named_module_runs(module: str) -> None:
    assert "--help" in options_of(module)


@pytest.mark.parametrize(("module", "arguments"), COMMANDS)
def test_a_command_uses_options_that_exist(module: str, arguments: str) -> None:
    assert set(OPTION.findall(arguments)) <= options_of(module)


@pytest.mark.parametrize(("heading", "text"), list(sections()), ids=[heading for heading, _ in sections()])
def test_every_option_named_exists(heading: str, text: str) -> None:
    door = re.fullmatch(r"`python -m ([a-z0-9_.]+)`", heading)
    doors = [door[1]] if door else DOORS
    known = frozenset().union(*map(options_of, doors))
    prose = re.sub(r"python -m [a-z0-9_.]+[^\n`]*", "", text)
    assert set(OPTION.findall(prose)) <= known


@pytest.mark.parametrize("door", DOORS[2:])
def test_the_torch_free_doors_options_are_all_named(door: str) -> None:
    text = dict(sections())[f"`python -m {door}`"]
    assert options_of(door) - {"--help"} <= set(OPTION.findall(text))


def test_all_options_of_export_are_named() -> None:
    text = dict(sections())["`python -m export.run`"]
    assert options_of("export.run") - {"--help"} <= set(OPTION.findall(text))


@pytest.mark.parametrize("code", PYTHON)
def test_a_python_example_imports_what_exists(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_every_linked_file_exists() -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_exit_codes_are_those_of_the_code() -> None:
    door = importlib.import_module("patchslim.errors")
    codes = {value for name, value in vars(door).items() if name.startswith("EXIT_")}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)} == codes


def test_the_extras_are_those_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"^\| `([a-z]+)` \|", dict(sections())["Extras"], flags=re.MULTILINE)
    assert sorted(named) == sorted(project["optional-dependencies"])
