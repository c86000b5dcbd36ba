"""The C++ client, compiled and run against ONNX Runtime's library; skipped where its headers are not here."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.bundles import SIZE
from tests.helpers.serving import bundle_with_serving
from validate.bundle import load_manifest

pytestmark = pytest.mark.slow
HEADER = "onnxruntime_cxx_api.h"
PLACES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/include", "/usr/local/include")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_serving(tmp_path_factory.mktemp("serving") / "tiny")


@pytest.fixture(scope="module")
def program(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client, compiled as its own comment says, with the library of ONNX Runtime's wheel."""
    places = [Path(place) for place in (os.environ.get("ONNXRUNTIME_INCLUDE"), *PLACES) if place]
    include = next((place for place in places if (place / HEADER).is_file()), None)
    if include is None:
        pytest.skip(f"no {HEADER} in {', '.join(map(str, places))}: name its folder in ONNXRUNTIME_INCLUDE")
    found = util.find_spec("onnxruntime")
    libraries = (
        [] if found is None or found.origin is None else sorted(Path(found.origin).parent.glob("capi/libonnxruntime.so*"))
    )
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or not libraries:
        pytest.skip("no C++ compiler, or no ONNX Runtime with a shared library")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "libonnxruntime.so").symlink_to(libraries[0])
    (folder / libraries[0].name).symlink_to(libraries[0])
    (folder / "libonnxruntime.so.1").symlink_to(libraries[0])
    source = bundle / "serving" / "classify.cpp"
    command = [compiler, "-std=c++17", "-Wall", source, "-I", include, "-L", folder, f"-Wl,-rpath,{folder}"]
    command += ["-l", "onnxruntime", "-o", folder / "classify"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "classify"


def classify(program: Path, bundle: Path, picture: Path) -> subprocess.CompletedProcess[str]:
    command = [program, bundle / "model.onnx", bundle / "serving" / "labels.txt", picture]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_it_names_what_the_model_answers(program: Path, bundle: Path, tmp_path: Path) -> None:
    manifest, golden = load_manifest(bundle), np.load(bundle / "golden.npz")
    mean, std = (np.array(values).reshape(-1, 1, 1) for values in (manifest.preprocessing.mean, manifest.preprocessing.std))
    for row, logits in enumerate(golden["slim_logits"]):
        pixels = np.rint((golden["inputs"][row] * std + mean) * 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(tmp_path / "picture.ppm")
        done = classify(program, bundle, tmp_path / "picture.ppm")
        assert done.returncode == 0, done.stderr
        found = [line.rpartition(": ") for line in done.stdout.splitlines()]
        first = logits.argsort()[::-1][:3]
        assert [label for label, _, _ in found] == [manifest.labels[index] for index in first]
        np.testing.assert_allclose([float(value) for _, _, value in found], logits[first], atol=2e-4)


@pytest.mark.parametrize("kind", ["another size", "a PNG", "cut off", "missing"])
def test_other_pictures_are_refused(kind: str, program: Path, bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.ppm"
    image = Image.fromarray(np.zeros((SIZE, SIZE + (kind == "another size"), 3), np.uint8))
    if kind != "missing":
        image.save(picture, format="PNG" if kind == "a PNG" else "PPM")
    if kind == "cut off":
        picture.write_bytes(picture.read_bytes()[:-1])
    done = classify(program, bundle, picture)
    assert done.returncode == 3
    assert f"{picture}: is not a binary PPM of 8 x 8 pixels" in done.stderr
