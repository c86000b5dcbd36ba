"""Engines that can be given weights: what TensorRT is asked for, what bundles and recipes say of it, and where it is refused.

No GPU was at hand: what TensorRT builds of it was not executed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from export import export_bundle
from export.build import BuildDoorOptions, run
from export.engine_from_recipe import RecipeBuild, build_recipe
from export.engines.base import Backend, BuildOptions, BuildSettings, EngineResult
from export.engines.onnx_info import read_onnx
from export.engines.tensorrt_build import build_files
from patchslim import cuda
from patchslim.errors import Unavailable
from patchslim.records import save_record
from tests.helpers.bundles import make_bundle
from tests.helpers.exports import tiny
from tests.helpers.tensorrt_vit import fp16_recipe
from validate.build_recipe import BuildRecipe, trtexec_line

without_gpu = pytest.mark.skipif(cuda.local_target() is not None, reason="a GPU is visible: the engine is built")
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


def test_flags_are_tensorrts_own() -> None:
    asked = [BuildSettings(refit=refit, strip_weights=strip).flags for refit in (False, True) for strip in (False, True)]
    assert asked == [[], ["STRIP_PLAN", "REFIT_IDENTICAL"], ["REFIT"], ["STRIP_PLAN", "REFIT"]]


@needs_rtx
def test_tensorrt_rtx_has_what_is_asked_of_it() -> None:
    import tensorrt_rtx as trt

    assert {"REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"} <= {*trt.BuilderFlag.__members__}
    for owner, names in (
        (trt.OnnxParserRefitter, ("refit_from_bytes", "refit_from_file", "num_errors", "get_error")),
        (trt.Refitter, ("get_missing_weights", "refit_cuda_engine")),
        (trt.ICudaEngine, ("refittable", "get_engine_stat")),
        (trt.EngineStat, ("STRIPPED_WEIGHTS_SIZE",)),
    ):
        assert all(hasattr(owner, name) for name in names), owner


def test_options_are_settings_of_trt_alone() -> None:
    several = tiny(Path("work"), engine="ort,trt", strip_weights=True)
    several.check()
    ort, trt = (several.for_engine(name).builder_settings for name in ("ort", "trt"))
    assert (ort, trt) == (None, BuildSettings(tf32=True, strip_weights=True))


@without_gpu
@needs_rtx
@pytest.mark.parametrize(
    ("options", "said"), [({"refit": True}, "--refit: "), ({"refit": True, "strip_weights": True}, "--strip-weights: ")]
)
def test_an_export_without_a_gpu_is_refused_before_anything_slow(options: dict[str, bool], said: str, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=said + "TensorRT-RTX needs a GPU .*give it to export.build"):
        export_bundle(tiny(tmp_path / "work", engine="trt", **options))
    assert not (tmp_path / "work").exists()


@without_gpu
@needs_rtx
def test_a_device_without_a_gpu_refuses_what_is_asked_of_it_or_in_the_recipe(tmp_path: Path) -> None:
    recipe = make_bundle(tmp_path / "bundle") / "recipe.json"
    with pytest.raises(Unavailable, match="--refit: TensorRT-RTX needs a GPU"):
        run(BuildDoorOptions(recipe, tmp_path / "built", refit=True))
    plain = BuildRecipe.model_validate_json(recipe.read_bytes())
    asking = plain.model_copy(update={"settings": plain.settings.model_copy(update={"strip_weights": True})})
    save_record(recipe, asking.model_copy(update={"trtexec": trtexec_line(asking)}))
    with pytest.raises(Unavailable, match="--strip-weights: TensorRT-RTX needs a GPU"):
        build_recipe(RecipeBuild(recipe, tmp_path / "built"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.mark.slow
@without_gpu
@needs_rtx
def test_tensorrt_rtx_itself_fails_without_a_driver(tmp_path: Path) -> None:
    onnx = fp16_recipe(tmp_path) / "model.fp16.onnx"
    backend = Backend("tensorrt_rtx", ("sm89",), ahead_of_time=True)
    for settings in (BuildSettings(refit=True), BuildSettings(strip_weights=True)):
        options = BuildOptions(backend.targets, "fp16", (1, 2, 4), settings=settings)
        with pytest.raises(Unavailable, match=r"did not build it for sm89: .*CUDA_SUCCESS"):
            build_files(onnx, tmp_path / "out", read_onnx(onnx), backend, options)


def test_a_record_names_the_onnx_file_and_is_as_before_without() -> None:
    engine = EngineResult("tensorrt", "11", ["sm90"], "fp16", (1, 8, 32), [], None, 12, executed=False)
    plain = engine.record([], "not executed", "model.fp16.onnx").model_dump(mode="json")
    assert "weights_from" not in plain
    stripped = dataclasses.replace(engine, weights=Path("kept/anything.onnx"))
    written = stripped.record([], "not executed", "model.fp16.onnx").model_dump(mode="json")
    assert written == plain | {"weights_from": "model.fp16.onnx"}
