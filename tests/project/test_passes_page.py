"""docs/passes.md keeps its word: it quotes a pass as it is, and its commands have the options that it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")


def test_the_quoted_pass_is_the_file() -> None:
    (quoted,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert quoted == (ROOT / "graph_passes" / "passes" / "cut_last_block.py").read_text(encoding="utf-8")


def test_its_options_exist() -> None:
    command = [sys.executable, "-m", "graph_passes.run", "--help"]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    option = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
    assert set(option.findall(PAGE)) <= set(option.findall(done.stdout))


def test_the_files_it_names_exist() -> None:
    named = re.findall(r"`([a-z]+\.py)`", PAGE)
    assert named
    assert [name for name in named if not any((ROOT / "graph_passes").rglob(name))] == []


def test_it_is_one_screen_and_a_pass() -> None:
    assert len(PAGE.splitlines()) < 90
