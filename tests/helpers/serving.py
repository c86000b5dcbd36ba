"""The serving files of a small bundle, and running what they tell to run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from export.serving.facts import serving_facts
from export.serving.render import serving_files, write_serving
from tests.helpers.bundles import make_bundle, reseal
from validate.bundle import load_manifest


def bundle_with_serving(folder: Path, **changes: Any) -> Path:
    """A small valid bundle, but for ``changes`` to its manifest's fields, with ``serving/`` made from that manifest."""
    make_bundle(folder, **changes)
    write_serving(load_manifest(folder), folder)
    reseal(folder)
    return folder


def rendered(folder: Path, **changes: Any) -> dict[str, str]:
    """The serving files of the bundle in ``folder``, with ``changes`` to its manifest's fields, by their paths."""
    return serving_files(serving_facts(load_manifest(folder).model_copy(update=changes)))


def script(path: Path, *arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a Python file of a bundle, in a process of its own; its working folder is the bundle."""
    bundle = next(parent for parent in path.parents if (parent / "manifest.json").is_file())
    command = [sys.executable, str(path), *map(str, arguments)]
    return subprocess.run(command, cwd=bundle, capture_output=True, text=True, timeout=60, **more)


def commands(readme: str) -> list[list[str]]:
    """The lines of a README's shell blocks, each as words."""
    blocks = re.findall(r"```sh\n(.*?)```", readme, flags=re.DOTALL)
    return [line.split() for block in blocks for line in block.splitlines()]
