"""The ``edge`` extra alone, really installed: passes and checks run in an environment that has no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.helpers.bundles import make_bundle
from tests.helpers.onnx_models import dense, ort_logits, plan_for, reference
from tests.helpers.tensorrt_vit import DEPTH, fp16_recipe

ROOT = Path(__file__).parents[2]
#: What the wheel says to install, since no index has it.
WHEEL = "./patchslim-0.1.0-py3-none-any.whl[export]"
#: What uv says when no package index answers; anything else that it says is a failure of ours.
UNREACHABLE = ("dns error", "error sending request", "failed to fetch", "connection refused", "timed out", "network")


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a throw-away environment: the project's wheel with the locked packages of ``edge``, nothing else."""
    return installed(tmp_path_factory.mktemp("edge") / "venv", "--extra", "edge")


def installed(folder: Path, *extras: str) -> Path:
    """The Python of a new environment in ``folder`` with the project's wheel and the locked packages of ``extras``."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on PATH")
    settings = {"UV_PROJECT_ENVIRONMENT": str(folder), "UV_PYTHON": sys.executable}
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"} | settings
    command = [
        uv,
        "sync",
        "--frozen",
        "--no-default-groups",
        "--no-editable",
        *extras,
        "--reinstall-package",
        "patchslim",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode and any(word in done.stderr.lower() for word in UNREACHABLE):
        pytest.skip(f"packages cannot be fetched from here: {' '.join(done.stderr.split())[:300]}")
    assert done.returncode == 0, done.stderr
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def run(python: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run outside the checkout, so that only what is installed can be imported."""
    ours = ("PYTHONPATH", "PYTHONPYCACHEPREFIX", "VIRTUAL_ENV")  # byte code of a throw-away environment goes away with it
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    command = [str(python), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_there_is_no_torch(edge: Path, tmp_path: Path) -> None:
    done = run(edge, "-c", "import torch", cwd=tmp_path)
    assert "ModuleNotFoundError: No module named 'torch'" in done.stderr


def test_the_packages_import_from_the_wheel(edge: Path, tmp_path: Path) -> None:
    code = "import graph_passes, validate; print(graph_passes.slim.__module__, graph_passes.__file__, validate.__file__)"
    done = run(edge, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout


@pytest.mark.parametrize(
    "door", ["export.run", "export.build", "slimming.run", "graph_passes.run", "validate.run", "validate.diff"]
)
def test_every_door_answers_help(edge: Path, door: str, tmp_path: Path) -> None:
    done = run(edge, "-m", door, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def installed_files(edge: Path, tmp_path: Path) -> list[Path]:
    """Every file that was installed, as a path within site-packages."""
    done = run(edge, "-c", "import patchslim, pathlib; print(pathlib.Path(patchslim.__file__).parents[1])", cwd=tmp_path)
    packages = Path(done.stdout.strip())
    return [path.relative_to(packages) for path in packages.rglob("*") if path.is_file()]


def test_nothing_is_installed_but_what_a_device_needs(edge: Path, tmp_path: Path) -> None:
    files = installed_files(edge, tmp_path)
    assert Path("patchslim/py.typed") in files
    assert not {"tests", "benchmarks", "docs", "weights", "patchslim_digits"} & {path.parts[0] for path in files}
    assert not [path for path in files if path.suffix == ".safetensors" or path.name.startswith("train_")]


def test_the_console_command_runs(edge: Path, tmp_path: Path) -> None:
    command = edge.with_name("patchslim")
    told = run(command, "--version", cwd=tmp_path)
    assert (told.returncode, told.stdout) == (0, "patchslim 0.1.0\n"), told.stderr
    assert run(command, "--help", cwd=tmp_path).stdout.startswith("usage: patchslim")
    make_bundle(tmp_path / "bundle")
    assert run(command, "validate", "bundle", "--threads", 1, "--latency-seconds", 0, cwd=tmp_path).returncode == 0
    done = run(command, "export", cwd=tmp_path)
    assert (done.returncode, WHEEL in done.stderr) == (4, True), done.stderr


def test_doctor_says_what_a_device_has_and_what_to_install(edge: Path, tmp_path: Path) -> None:
    done = run(edge.with_name("patchslim"), "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {one["name"]: one["version"] for one in found["packages"]}["torch"] is None
    assert found["extras"]["edge"]["missing"] == []
    assert "torch" in found["extras"]["export"]["missing"]
    assert found["extras"]["export"]["install"] == f'pip install ./patchslim_digits-*.whl "{WHEEL}"'
    states = {(row["engine"], row["target"], row["precision"]): row["status"] for row in found["engines"]}
    assert states["ort", "cpu", "fp16"] == "runs"
    assert states["trt", "sm89", "fp16"] == "missing"
    assert "To install what is missing:" in run(edge.with_name("patchslim"), "doctor", cwd=tmp_path).stdout


def test_the_bundled_weights_say_what_to_install(edge: Path, tmp_path: Path) -> None:
    code = "from slimming.models.loading import bundled_weights; bundled_weights('vit_ti')"
    done = run(edge, "-c", code, cwd=tmp_path)
    assert "Unavailable: the bundled weights of vit_ti are not installed: " in done.stderr
    assert WHEEL in done.stderr


def test_a_door_that_needs_torch_says_what_to_install(edge: Path, tmp_path: Path) -> None:
    for door in ("export.run", "slimming.run"):
        done = run(edge, "-m", door, "--output", tmp_path / "out", cwd=tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (4, False), f"{door}: {done.stderr}"
        assert WHEEL in done.stderr


def test_graph_passes_cut_a_real_export(edge: Path, tmp_path: Path) -> None:
    model, exported = dense("plain")
    plan = plan_for(model, [list(range(17)), [*range(9)], [0, 2, 3, 5], [0]])
    onnx.save(exported, tmp_path / "dense.onnx")
    plan.save(tmp_path / "plan.json")
    done = run(edge, "-m", "graph_passes.run", "dense.onnx", "--plan", "plan.json", "-o", "slim.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    slim = ort_logits(onnx.load(tmp_path / "slim.onnx"), images)
    np.testing.assert_allclose(slim, reference(model, plan, images), atol=1e-4)
    assert np.abs(slim - ort_logits(exported, images)).max() > 1e-2


def test_validate_checks_a_bundle(edge: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    done = run(edge, "-m", "validate.run", "bundle", "--threads", 1, "--latency-seconds", 0, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"not what was promised")
    assert run(edge, "-m", "validate.run", "bundle", cwd=tmp_path).returncode == 3


def test_the_build_door_says_what_to_install(edge: Path, tmp_path: Path) -> None:
    fp16_recipe(tmp_path)
    done = run(edge, "-m", "export.build", "recipe.json", "-o", "engine", cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (4, False), done.stderr
    assert f'pip install "{WHEEL.replace("export", "rtx")}"' in done.stderr
    (tmp_path / "model.fp16.onnx").write_bytes(b"not what was promised")
    assert run(edge, "-m", "export.build", "recipe.json", "-o", "engine", cwd=tmp_path).returncode == 3


@pytest.mark.slow
def test_an_engine_is_built_where_there_is_no_torch(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    device = installed(tmp_path / "venv", "--extra", "edge", "--extra", "rtx")
    for module in ("torch", "timm"):
        assert run(device, "-c", f"import {module}", cwd=tmp_path).returncode == 1
    fp16_recipe(tmp_path)
    done = run(device.with_name("patchslim"), "build", "recipe.json", "-o", "engine", "--target", "sm89", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{DEPTH} of {DEPTH} attentions fused" in done.stdout
    assert (tmp_path / "engine" / "model.fp16.sm89.engine").stat().st_size > 10_000


def test_the_base_install_checks_a_bundle_but_for_its_models(tmp_path: Path) -> None:
    base = installed(tmp_path / "venv")
    for module in ("onnx", "onnxruntime", "PIL", "scipy", "torch"):
        assert run(base, "-c", f"import {module}", cwd=tmp_path).returncode == 1
    make_bundle(tmp_path / "bundle")
    done = run(base, "-m", "validate.run", "bundle", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["unchecked"]) == 4
    assert f'pip install "{WHEEL.replace("export", "edge")}"' in done.stderr
    done = run(base, "-m", "validate.run", "bundle", cwd=tmp_path)
    assert (done.returncode, "passed as far as it could be checked here" in done.stdout) == (0, True), done.stderr
    assert run(base, "-m", "validate.run", "bundle", "--provider", "CPUExecutionProvider", cwd=tmp_path).returncode == 4
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"not what was promised")
    assert run(base, "-m", "validate.run", "bundle", cwd=tmp_path).returncode == 3
