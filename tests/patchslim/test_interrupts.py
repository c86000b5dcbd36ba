"""An interrupt while a module is imported: it is raised behind the import, and not in the middle of its C++."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULE = """
import os, signal, time
os.kill(os.getpid(), signal.{signal})
for _ in range(20):
    time.sleep(0.005)  # an exception could come here
print("imported", flush=True)
"""
CODE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from patchslim.interrupts import ignore_interrupts, raise_when_interrupted, was_interrupted
raise_when_interrupted()
try:
    import module_that_is_interrupted
    time.sleep(30)
    print("never raised")
except KeyboardInterrupt:
    print("raised", was_interrupted())
ignore_interrupts()
time.sleep(0.2)  # nothing comes after it
print("done")
"""


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_it_is_raised_behind_the_import(signal: str, tmp_path: Path) -> None:
    (tmp_path / "module_that_is_interrupted.py").write_text(MODULE.format(signal=signal))
    done = subprocess.run([sys.executable, "-c", CODE, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (0, ["imported", "raised True", "done"]), done.stderr


def test_an_import_that_takes_too_long_is_interrupted(tmp_path: Path) -> None:
    (tmp_path / "module_that_is_interrupted.py").write_text(
        MODULE.format(signal="SIGINT").replace("range(20)", "range(20_000)")
    )
    code = CODE.replace(
        "raise_when_interrupted()\n", "import patchslim.interrupts as own\nown._MOST = 5\nraise_when_interrupted()\n", 1
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (0, ["raised True", "done"]), done.stderr
