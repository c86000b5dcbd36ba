"""The structure, from the imports: arrows one way, no circle at any depth, torch only where it may be, no private names.

Imports inside functions, under ``TYPE_CHECKING``, by ``import_module`` and by ``lazy_names`` count like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
#: What each package may import of ours beside itself: the arrows of the house, from the ground up.
ARROWS: dict[str, set[str]] = {
    "patchslim": set(),
    "validate": {"patchslim"},
    "graph_passes": {"patchslim"},
    "slimming": {"patchslim", "graph_passes"},
    "export": {"patchslim", "graph_passes", "slimming", "validate"},
    "benchmarks": {"patchslim", "graph_passes", "slimming", "validate", "export"},
}
TORCH_FREE = ("patchslim", "validate", "graph_passes")
#: Modules of packages with torch that are read where there is none: options, plans' prices, public names.
TORCH_FREE_MODULES = (
    "slimming",
    "slimming.options",
    "slimming.fitting.recipe",
    "slimming.search.budget",
    "slimming.search.costs",
    "slimming.search.profile",
    "export",
    "export.build",
    "export.options",
    "export.console",
    "export.doctor",
    "export.engines.build",
    "export.engines.support",
    "export.engines.tensorrt_worker",
    "export.publication",
    "export.engine_from_recipe",
)
NEEDS_TORCH = ("torch", "torchvision", "timm")


@dataclass(frozen=True)
class Import:
    """One imported name: ``module`` is one of ours or a third party's, ``name`` what is taken from it ("" for all of it)."""

    line: int
    module: str
    name: str


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of ours by its full name."""
    return {module_of(path, root): path for package in ARROWS for path in sorted((root / package).rglob("*.py"))}


def imports(path: Path, known: Mapping[str, Path], root: Path = ROOT) -> Iterator[Import]:
    """Everything that a file imports, wherever in the file; ``from package import module`` is an import of that module."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parent = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{parent}.{alias.name}".lstrip(".")
                yield Import(node.lineno, full, "") if full in known or not parent else Import(node.lineno, parent, alias.name)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and node.args:
                first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield Import(node.lineno, first.value.rstrip("."), "")
            elif called == "lazy_names" and len(node.args) == 2 and isinstance(node.args[1], ast.Dict):
                for key, value in zip(node.args[1].keys, node.args[1].values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                        yield Import(node.lineno, value.value, key.value)


def graph(root: Path = ROOT) -> dict[str, dict[str, list[Import]]]:
    """For every module of ours, the modules of ours that it imports, and where."""
    known = modules(root)
    found: dict[str, dict[str, list[Import]]] = {module: defaultdict(list) for module in known}
    for module, path in known.items():
        for one in imports(path, known, root):
            target = one.module
            while target and target not in known:  # ``import package.module.name`` names at least a package of ours
                target = target.rpartition(".")[0]
            if target and target != module:
                found[module][target].append(one)
    return found


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of two or more nodes that reach each other (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(arrows):
        if node not in number:
            visit(node)
    return found


def room_of(module: str) -> str:
    """A folder within a package, or a file that lies in the package itself."""
    return ".".join(module.split(".")[:2])


def wrong_arrows(root: Path = ROOT) -> list[str]:
    """Imports from a package that the importing one may not know."""
    found = []
    for module, targets in graph(root).items():
        package = module.partition(".")[0]
        for target, places in targets.items():
            other = target.partition(".")[0]
            if other != package and other not in ARROWS[package]:
                found += [f"{module}:{place.line} imports {target}" for place in places]
    return found


def file_circles(root: Path = ROOT) -> list[list[str]]:
    """Circles of files. A package's ``__init__`` gives out names of its modules, which is no arrow back into them."""
    arrows = {
        module: {target for target in targets if not (root / target.replace(".", "/") / "__init__.py").exists()}
        for module, targets in graph(root).items()
    }
    facades = {module for module in arrows if (root / module.replace(".", "/") / "__init__.py").exists()}
    return circles({module: targets for module, targets in arrows.items() if module not in facades})


def room_circles(package: str, root: Path = ROOT) -> list[list[str]]:
    """Circles of the rooms within a package."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, targets in graph(root).items():
        if module.partition(".")[0] == package and module != package:
            rooms[room_of(module)] |= {
                room_of(target) for target in targets if target.startswith(f"{package}.") and room_of(target) != room_of(module)
            }
    return circles(rooms)


def private_imports(root: Path = ROOT) -> list[str]:
    """Imports of a name that begins with an underscore from another module of ours."""
    return [
        f"{module}:{place.line} imports {target}.{place.name}"
        for module, targets in graph(root).items()
        for target, places in targets.items()
        for place in places
        if place.name.startswith("_") and not place.name.startswith("__")
    ]


def test_there_are_no_other_packages() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert found == set(ARROWS)


def test_arrows_run_one_way() -> None:
    assert wrong_arrows() == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert file_circles() == []


@pytest.mark.parametrize("package", ARROWS)
def test_no_rooms_import_each_other_in_a_circle(package: str) -> None:
    assert room_circles(package) == []


def test_no_module_imports_another_modules_private_name() -> None:
    assert private_imports() == []


def test_no_test_imports_another() -> None:
    known = modules() | {module_of(path, ROOT): path for path in (ROOT / "tests").rglob("*.py")}
    found = [
        f"{path.relative_to(ROOT)}:{one.line} imports {one.module}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for one in imports(path, known)
        if one.module.rpartition(".")[2].startswith("test_") or one.module.rpartition(".")[2] == "conftest"
    ]
    assert found == []


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"graph_passes/a.py": "import export"}, "wrong arrow"),
        ({"validate/a.py": "def f():\n    from slimming.b import g"}, "wrong arrow"),
        ({"validate/a.py": "from importlib import import_module\nimport_module(f'export.{x}')"}, "wrong arrow"),
        ({"patchslim/a.py": "from .. import export"}, "wrong arrow"),
        ({"patchslim/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import validate.b"}, "wrong arrow"),
        ({"slimming/a.py": "from graph_passes.b import f\nimport numpy"}, ""),
        ({"slimming/a.py": "from slimming import b", "slimming/b.py": "def f():\n    from slimming.a import g"}, "circle"),
        ({"export/x/a.py": "import export.y.b", "export/y/b.py": "", "export/y/c.py": "import export.x.a"}, "rooms"),
        ({"export/x/a.py": "import export.y.b", "export/y/b.py": ""}, ""),
        ({"export/a.py": "from slimming.b import _f"}, "private"),
        ({"slimming/__init__.py": "lazy_names(__name__, {'f': 'slimming.a'})", "slimming/a.py": "from slimming import b"}, ""),
    ],
)
def test_a_fault_is_seen(files: dict[str, str], fault: str, tmp_path: Path) -> None:
    for package in ARROWS:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "b.py").touch()
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = {
        "wrong arrow": wrong_arrows(tmp_path),
        "circle": file_circles(tmp_path),
        "rooms": [group for package in ARROWS for group in room_circles(package, tmp_path)],
        "private": private_imports(tmp_path),
    }
    assert {name for name, faults in found.items() if faults} - ({"rooms"} if fault == "circle" else set()) == ({fault} - {""})


def torch_free_modules() -> list[str]:
    """What must import where torch is not installed."""
    return sorted({*TORCH_FREE_MODULES, *(name for name in modules() if name.partition(".")[0] in TORCH_FREE)})


@pytest.mark.parametrize("module", torch_free_modules())
def test_a_torch_free_module_never_names_torch(module: str) -> None:
    known = modules()
    found = [one for one in imports(known[module], known) if one.module.partition(".")[0] in NEEDS_TORCH]
    assert found == []


def test_importing_the_torch_free_modules_does_not_load_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {torch_free_modules()!r}: importlib.import_module(name)\n"
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
