"""``validate.run`` in a process that cannot import what a device does not have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.bundles import Answer

ROOT = Path(__file__).parents[2]


#: Packages that the subprocess's import system says are not installed: those that ``edge`` does not bring.
BLOCKED = (
    "torch",
    "torchvision",
    "timm",
    "sklearn",
    "matplotlib",
    "tensorrt",
    "openvino",
    "slimming",
    "graph_passes",
    "export",
)


def run(*arguments: object, module: str = "validate.run", blocked: tuple[str, ...] = BLOCKED) -> Answer:
    code = (
        "import sys, runpy\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name.split('.')[0] in {blocked!r}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"sys.argv = ['x', *{[str(a) for a in arguments]!r}]; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    env = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, env=env)
    return Answer(done.returncode, done.stdout, done.stderr)
