"""Arrows between the rooms point one way, what must run without torch never imports it, and nothing names one machine."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("export", "graph_passes", "patchslim", "slimming", "validate")
#: What each room may import of ours; a name allows its submodules too. ``slimming.onnx_models`` has more.
ALLOWED = {
    "export": ROOMS,
    "graph_passes": ("graph_passes", "patchslim"),
    "patchslim": ("patchslim",),
    "slimming": ("patchslim", "slimming"),
    "slimming/onnx_models": ("patchslim", "slimming", "graph_passes"),
    "validate": ("patchslim", "validate"),
}
OURS = (*ROOMS, "benchmarks", "tests", "docs")
TORCH_FREE = [
    *sorted((ROOT / "graph_passes").rglob("*.py")),
    *sorted((ROOT / "patchslim").rglob("*.py")),
    *sorted((ROOT / "validate").rglob("*.py")),
    ROOT / "slimming" / "__init__.py",
    ROOT / "slimming" / "search" / "budget.py",
    ROOT / "slimming" / "search" / "costs.py",
    ROOT / "slimming" / "options.py",
    ROOT / "slimming" / "search" / "profile.py",
    ROOT / "slimming" / "fitting" / "recipe.py",
]
NEEDS_TORCH = ("torch", "torchvision", "timm")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in the file, ``import_module`` included."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parent = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{parent}.{alias.name}".lstrip(".")) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value.rstrip(".")


def is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offences(path: Path, allowed: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(path)
        if is_in(name, OURS) and not is_in(name, allowed)
    ]


def files_of(room: str) -> list[Path]:
    """The files of a room that follow its own rule, not that of a part of it."""
    parts = [ROOT / part for part in ALLOWED if part.startswith(f"{room}/")]
    return [path for path in sorted((ROOT / room).rglob("*.py")) if not any(part in path.parents for part in parts)]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_its_arrows_allow(room: str) -> None:
    files = files_of(room)
    assert files
    assert not [offence for path in files for offence in offences(path, ALLOWED[room])]


def test_only_the_part_for_onnx_graphs_is_let_through_to_the_graph_passes() -> None:
    assert {room for room, allowed in ALLOWED.items() if "graph_passes" in allowed} == {
        "slimming/onnx_models",
        "graph_passes",
        "export",
    }
    assert {*files_of("slimming/onnx_models")} == {*(ROOT / "slimming").rglob("*.py")} - {*files_of("slimming")}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("import export", False),
        ("from export.engines import base", False),
        ("def f():\n    from slimming import search", False),
        ("from importlib import import_module\nimport_module(f'export.{x}')", False),
        ("from .. import export", False),
        ("from patchslim.plan import SlimPlan", True),
        ("from patchslim import plan", True),
        ("from graph_passes.analysis.patterns import label", True),
        ("import numpy", True),
    ],
)
def test_a_wrong_arrow_is_seen(text: str, allowed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "graph_passes" / "example.py"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    assert (offences(path, ALLOWED["graph_passes"]) == []) is allowed


@pytest.mark.parametrize("path", TORCH_FREE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_torch_free_file_never_imports_torch(path: Path) -> None:
    assert not [f"line {line}: {name}" for line, name in imports(path) if is_in(name, NEEDS_TORCH)]


def test_importing_the_torch_free_modules_does_not_load_torch() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in TORCH_FREE]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(*(name for name in {NEEDS_TORCH!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def committed_text() -> Iterator[tuple[str, str]]:
    """Path and text of every tracked text file."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            yield name, data.decode("utf-8", errors="replace")


def test_no_file_names_a_place_on_one_machine() -> None:
    places = [place for place in {str(ROOT), sys.prefix} if len(Path(place).parts) > 2]
    homes = [f"/{folder}/" for folder in ("home", "Users")]
    found = [f"{name}: {place}" for name, text in committed_text() for place in (*places, *homes) if place in text]
    assert not found


def test_the_lock_file_names_public_package_hosts_only() -> None:
    lock = (ROOT / "uv.lock").read_text(encoding="utf-8")
    hosts = {urlsplit(word).hostname for word in lock.split('"') if word.startswith(("http://", "https://"))}
    assert hosts <= {"pypi.org", "files.pythonhosted.org"}
