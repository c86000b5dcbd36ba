"""Attacks on ``serving/``: scripts and configurations that a stranger put there. ``validate`` runs none of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from export.serving.render import write_serving
from tests.helpers.attacks.bundles import Damage, add, seal
from validate.bundle import load_manifest

#: What would be seen if anything ran it.
TRAP = "from pathlib import Path\n(Path(__file__).resolve().parents[2] / 'it ran').touch()\n"
MODEL = "serving/triton/python/model.py"


def served(damage: Callable[[Path], object], *, sealed: bool = False) -> Damage:
    """Give the bundle its serving files and seal it; then do the damage, and seal that too where ``sealed``."""

    def change(bundle: Path) -> None:
        write_serving(load_manifest(bundle), bundle)
        seal(bundle)
        damage(bundle)
        if sealed:
            seal(bundle)

    return change


def written(name: str, text: str) -> Callable[[Path], object]:
    """Write a file of the bundle."""
    return lambda bundle: (bundle / name).write_text(text, encoding="utf-8")


def linked(name: str) -> Callable[[Path], object]:
    """Put a link out of the bundle in the place of one of its files."""

    def damage(bundle: Path) -> None:
        (bundle / name).unlink()
        (bundle / name).symlink_to(sys.executable)

    return damage


add("serving files as they are", 0, (), served(lambda bundle: None))
add("another model.py", 3, (MODEL, "truncated or replaced"), served(written(MODEL, TRAP)))
add(
    "a script that nobody listed",
    3,
    ("serving/triton/setup.py", "not listed"),
    served(written("serving/triton/setup.py", TRAP)),
)
add("a link for a script", 3, ("serve.py", "link"), served(linked("serving/triton/serve.py")))
add(
    "a linked serving folder", 3, ("repository", "link"), served(lambda bundle: (bundle / "serving/repository").symlink_to("/"))
)
add("no configuration", 3, ("config.pbtxt", "missing"), served(lambda b: (b / "serving/triton/python/config.pbtxt").unlink()))
add("a pipe for labels", 3, ("labels", "special file"), served(lambda bundle: os.mkfifo(bundle / "serving/labels")))
add(
    "a serving model beside ours",
    3,
    ("onnx: lacks serving/triton/model.onnx",),
    served(written("serving/triton/model.onnx", "weights of a stranger"), sealed=True),
)
# A digest proves nothing against who writes the manifest too: it is whole, and nothing of it is run.
for _name in (MODEL, "serving/classify.py", "serving/sitecustomize.py", "serving/__init__.py", "serving/conftest.py"):
    add(f"a sealed trap in {_name}", 0, (), served(written(_name, TRAP), sealed=True))
