"""A bundle's engine built on this machine before it is checked: ``export.build`` as a command of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from patchslim import cuda
from patchslim.device import device_versions
from patchslim.errors import InputRejected, ParityFailed, PatchslimError, Unavailable, UsageError
from patchslim.targets import target_for
from validate.build_recipe import RECIPE, read_recipe
from validate.built_engine import read_build
from validate.engine_runs import BACKENDS, EngineKey

_KINDS: dict[int, type[PatchslimError]] = {
    kind.exit_code: kind for kind in (UsageError, InputRejected, Unavailable, ParityFailed)
}


def build_engine(bundle: Path, folder: Path, key: EngineKey | None) -> None:
    """Have ``export.build`` make the engine of a bundle that was checked, unless ``folder`` holds it already.

    ``key`` is trt or rtx; None: whichever is here. It runs in a process of its own, as a build does, and what it says on stderr
    is seen. Raises what that command ends with: ``InputRejected``, ``Unavailable``, ``ParityFailed``, ``UsageError``.
    """
    recipe = bundle / RECIPE
    _, digest = read_recipe(recipe)
    if _is_there(folder, digest, key):
        return
    command = [sys.executable, "-P", "-m", "export.build", str(recipe), "--output", str(folder), "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
    command += ["--engine", key] if key else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if not done.returncode:
        return
    try:
        error = json.loads(done.stdout)["error"]
    except (ValueError, KeyError):
        error = {"message": f"the build ended with code {done.returncode}", "next": None}
    kind = _KINDS.get(done.returncode, Unavailable)
    raise kind(f"--build: {error['message']}", next_step=error["next"] or "")


def _is_there(folder: Path, recipe_sha256: str, key: EngineKey | None) -> bool:
    """Whether an earlier build of this recipe, by the release that is installed and for this GPU, is whole."""
    try:
        record = read_build(folder)
    except (InputRejected, OSError):
        return False
    local, here = cuda.local_target(), device_versions()
    same = all(here.get(name) == version for name, version in record.tools.items() if name.startswith("tensorrt"))
    wanted = key is None or record.engine.backend == BACKENDS[key]
    return (
        same
        and wanted
        and record.recipe_sha256 == recipe_sha256
        and (local is None or target_for(local, record.engine.targets) is not None)
    )
