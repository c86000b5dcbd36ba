"""README and docs/ keep their word: commands, options, examples, exit codes, extras and files are those of the code."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.commands import door_here

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
README = PAGES["README.md"]
EVERYTHING = "\n".join(PAGES.values())
DOORS = ("export.run", "export.build", "slimming.run", "graph_passes.run", "validate.run", "validate.diff")
COMMAND = re.compile(r"-m ((?:benchmarks|export|graph_passes|slimming|validate)\b[a-z0-9_.]*)([^\n`]*)")
COMMANDS = sorted(set(COMMAND.findall(EVERYTHING)))
MODULES = sorted({module for module, _ in COMMANDS})
PYTHON = re.findall(r"```python\n(.*?)```", EVERYTHING, flags=re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
#: Commands other than those, with their options.
OTHERS = re.compile(
    r"(?:pytest|mkdocs|patchslim --version|pre-commit|ruff|torchrun|uv run --(?:group|with)"
    r"|docker (?:build|compose|run)|--build-arg|--gpus)\b[^\n`]*"
)
#: Scripts that pages tell to run: those of a bundle, and of docker/. Their options are in their text.
SCRIPTS = {
    path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8")
    for folder in ("export/serving/files", "docker")
    for path in sorted((ROOT / folder).rglob("*.py*"))
    if path.suffix != ".pyc"
}
TWO_COMMANDS = ("pip install uv && uv run python -m export.run --model vit_ti --engine trt", "pip install uv && uv run pytest")


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


def sections() -> Iterator[tuple[str, str, str]]:
    """Page, heading and text of each section."""
    for page, text in PAGES.items():
        for part in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
            heading, _, body = part.partition("\n")
            yield page, heading, body


def section(heading: str) -> str:
    """The text of the one section of this heading."""
    (found,) = [text for _, title, text in sections() if title == heading]
    return found


@pytest.mark.parametrize("command", TWO_COMMANDS)
def test_the_set_up_command_is_there_verbatim(command: str) -> None:
    assert command in README.splitlines()


def test_the_readme_is_two_screens() -> None:
    assert len(README.splitlines()) <= 135


def test_every_door_has_its_section() -> None:
    headings = [heading for _, heading, _ in sections() if "python -m" in heading]
    assert sorted(f"`python -m {door}`" for door in DOORS) == sorted(headings)


@pytest.mark.parametrize("module", MODULES)
def test_a_named_module_runs(module: str) -> None:
    assert "--help" in options_of(module)


@pytest.mark.parametrize(("module", "arguments"), COMMANDS)
def test_a_command_uses_options_that_exist(module: str, arguments: str) -> None:
    assert set(OPTION.findall(arguments)) <= options_of(module)


@pytest.mark.parametrize(
    ("page", "heading", "text"), list(sections()), ids=[f"{page}: {title}" for page, title, _ in sections()]
)
def test_every_option_named_exists(page: str, heading: str, text: str) -> None:
    door = re.fullmatch(r"`python -m ([a-z0-9_.]+)`", heading)
    doors = [door[1]] if door else [*DOORS, *(module for module, _ in COMMAND.findall(text))]  # a section may name others
    scripts = set(OPTION.findall("\n".join(code for name, code in SCRIPTS.items() if name in PAGES[page])))
    assert set(OPTION.findall(OTHERS.sub("", COMMAND.sub("", text)))) <= scripts.union(*map(options_of, doors))


@pytest.mark.parametrize("script", sorted(set(re.findall(r"python (?:serving|docker)/(\S+\.py)", EVERYTHING))))
def test_a_script_that_is_named_exists(script: str) -> None:
    assert script.rpartition("/")[2] in SCRIPTS


@pytest.mark.parametrize("door", DOORS)
def test_all_options_of_a_door_are_named(door: str) -> None:
    named = set(OPTION.findall(section(f"`python -m {door}`"))) | {"--help"}
    if door == "slimming.run":  # its section says: the options of export.run for model, images, budget and fitting, and these
        named |= set(OPTION.findall(section("`python -m export.run`")))
    assert options_of(door) <= named


@pytest.mark.parametrize("code", PYTHON)
def test_a_python_example_imports_what_exists(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.slow
def test_a_model_that_is_not_timms_goes_the_way_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import onnxruntime
    from transformers import ViTConfig, ViTForImageClassification

    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 48}
    ViTForImageClassification(ViTConfig(**sizes, num_labels=10)).save_pretrained("my-vit")
    text = section("A model that is not timm's")
    refused = door_here([sys.executable, "-m", "slimming.run", "--weights", "my-vit", "-o", "plan.json"])
    assert (refused.returncode, "these are Hugging Face's names: export that model to ONNX" in refused.stderr) == (3, True)
    exec(compile(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0], "docs", "exec"), {})
    for module, arguments in COMMAND.findall(text):
        few = {"slimming.run": ["--calibration-images", "16"]}.get(module, [])
        given = arguments.replace("--data pets --eval-images 1000", "--data digits --eval-images 16").split()
        done = door_here([sys.executable, "-m", module, *given, *few])
        assert done.returncode == 0, done.stderr
    slim = onnxruntime.InferenceSession(tmp_path / "slim.onnx")
    (logits,) = slim.run(None, {slim.get_inputs()[0].name: np.zeros((3, 3, 48, 48), np.float32)})
    assert logits.shape == (3, 10)
    (heading,) = re.findall(r"<h1>(.*?)</h1>", (tmp_path / "plan.html").read_text(encoding="utf-8"))
    assert "of the MACs removed, " in heading  # and what that costs, on these images


@pytest.mark.parametrize("name", re.findall(r"^::: (\S+)", PAGES["docs/python.md"], flags=re.MULTILINE))
def test_a_name_of_the_python_page_exists(name: str) -> None:
    assert pkgutil.resolve_name(name).__doc__


@pytest.mark.parametrize("page", PAGES)
def test_every_linked_file_exists(page: str) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_every_file_of_the_project_that_is_named_exists() -> None:
    named = re.findall(
        r"`((?:benchmarks|docker|docs|export|graph_passes|patchslim|slimming|tests|validate)/[\w./-]*)`", EVERYTHING
    )
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_exit_codes_are_those_of_the_code() -> None:
    errors = importlib.import_module("patchslim.errors")
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section("Exit codes"), flags=re.MULTILINE)} == codes


def test_the_console_commands_are_those_of_the_code() -> None:
    commands = importlib.import_module("export.console").COMMANDS
    assert set(re.findall(r"`patchslim ([a-z]+)", section("The commands and their packages"))) == set(commands)
    assert set(re.findall(r"`(?:uv run )?patchslim ([a-z]+)", EVERYTHING)) == set(commands)
    rows = re.findall(r"^\| `python -m ([a-z_.]+)` \| `patchslim ([a-z]+)` \|", PAGES["docs/reference.md"], flags=re.MULTILINE)
    assert {(commands[name].module, name) for name in commands if name != "doctor"} == set(rows)


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"^\| `([a-z]+)` \|", section("Extras"), flags=re.MULTILINE)
    assert sorted(named) == sorted(project["optional-dependencies"])


def test_every_schema_is_linked() -> None:
    schemas = {f"schemas/{path.name}" for path in (ROOT / "docs" / "schemas").glob("*.json")}
    assert schemas == set(re.findall(r"\]\((schemas/[^)]+)\)", PAGES["docs/reference.md"]))


def test_the_picture_of_the_whole_is_the_scripts() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "make_pipeline.py"))["render"]()
    assert drawn == (ROOT / "docs" / "pipeline.svg").read_text(encoding="utf-8")
