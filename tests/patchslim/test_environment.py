"""What the doors tell the threads of a run, before the library that reads it is there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_DOORS = ["export.run", "slimming.run", "graph_passes.run", "validate.run"]
_CODE = """
import os, runpy, sys
import patchslim.cli as cli

def told(*_arguments, **_options):
    print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
    return 0

cli.parse = told
try:
    runpy.run_module(sys.argv.pop(1), run_name="__main__")
except BaseException:
    pass
"""


def told_by(door: str, **environment: str) -> str:
    """What ``OMP_WAIT_POLICY`` is when ``door`` reads its options, and whether torch is imported by then."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", _CODE, door]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0]


@pytest.mark.parametrize("door", _DOORS)
def test_waiting_threads_leave_the_cores_to_others(door: str) -> None:
    assert told_by(door) == "PASSIVE False"


def test_what_the_user_says_stays() -> None:
    assert told_by("export.run", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE False"
