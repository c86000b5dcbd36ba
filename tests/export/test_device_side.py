"""From a bundle to a report and back: a device builds the engine, runs what it can, and the sender checks what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from patchslim import cuda
from patchslim.errors import Unavailable
from patchslim.files import digest
from patchslim.packages import install_command
from tests.helpers.attacks.bundle_recipes import in_bundle
from tests.helpers.bundles import make_bundle
from tests.helpers.tensorrt_vit import AHEAD_OF_TIME
from validate.build_recipe import parse_recipe, trtexec_line
from validate.built_engine import read_build
from validate.options import ValidateOptions
from validate.run import run

if TYPE_CHECKING:
    from export.pipeline import Outcome

no_gpu = pytest.mark.skipif(cuda.local_target() is not None, reason="a GPU is visible: the engine runs")


@no_gpu
@AHEAD_OF_TIME[0]
@AHEAD_OF_TIME[1]
def test_a_device_without_a_gpu_builds_and_says_what_it_could_not_run(
    trt_export: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(trt_export.bundle, tmp_path / "bundle"))
    options = ValidateOptions(bundle, build=True, threads=1, latency_seconds=0.01, json=True)
    assert run(options) == 0
    told = capsys.readouterr()
    record = json.loads(told.out)
    built = read_build(tmp_path / "bundle-built")
    assert built.recipe_sha256 == digest(bundle / "recipe.json")
    idle = next(check for check in record["checks"] if check["name"] == "golden parity, tensorrt_rtx")
    assert (idle["status"], idle["subject"]) == ("not executed", "model.fp16.sm89.engine")
    assert "the engine for sm89 did not run here: no CUDA driver or no visible GPU" in idle["detail"]
    assert {one["engine"] for one in record["engines"]} == {"ort", "openvino"}

    before = (tmp_path / "bundle-built" / "build.json").stat().st_mtime_ns
    assert run(options) == 0
    assert (tmp_path / "bundle-built" / "build.json").stat().st_mtime_ns == before  # it is there
    (tmp_path / "attestation.json").write_text(told.out)
    assert run(ValidateOptions(trt_export.bundle, attestation=tmp_path / "attestation.json")) == 0


@no_gpu
def test_a_build_that_this_machine_cannot_make(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    with pytest.raises(Unavailable, match="--build: ") as refused:
        run(ValidateOptions(bundle, build=True, engine=("trt",), threads=1))
    assert install_command("trt") in str(refused.value) or "nothing on a machine without a GPU" in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@no_gpu
@AHEAD_OF_TIME[0]
def test_what_a_recipe_asks_of_the_builder_is_asked_of_it(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    recipe = parse_recipe((bundle / "recipe.json").read_bytes(), bundle / "recipe.json")
    asking = recipe.model_copy(update={"settings": recipe.settings.model_copy(update={"strip_weights": True})})
    told = {"settings": asking.settings.model_dump(mode="json"), "trtexec": trtexec_line(asking)}
    in_bundle(bundle, lambda record: record.update(told))
    with pytest.raises(Unavailable, match="--build: --strip-weights: TensorRT-RTX needs a GPU to build an engine") as refused:
        run(ValidateOptions(bundle, build=True, threads=1))
    assert refused.value.next_step.startswith("run this on a machine with the engine's GPU")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_bundle_that_is_broken_is_not_built(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "model.onnx").write_bytes(b"")
    assert run(ValidateOptions(bundle, build=True)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
