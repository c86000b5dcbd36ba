"""What TensorRT's builder is told: from the command line into the engine, the recipe, and what a device builds of that."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from export import export_bundle
from export.engine_from_recipe import RecipeBuild, build_recipe
from export.engines.base import BuildSettings
from export.options import ExportOptions
from patchslim import cuda
from patchslim.cli import parse
from patchslim.records import save_record
from tests.helpers.exports import DEPTH, read, tiny
from tests.helpers.tensorrt_vit import AHEAD_OF_TIME
from validate import check_bundle
from validate.build_recipe import BuildRecipe, trtexec_line
from validate.build_recipe import BuildSettings as RecipeSettings
from validate.built_engine import read_build
from validate.recipe_run import build_engine


def test_options_are_profiles_and_settings() -> None:
    options = tiny(Path("work"), engine="trt", batch="1,2:4:8", workspace=64, optimization_level=1)
    options.check()
    assert (options.batch_profiles, options.batch_profile) == (((1, 1, 1), (2, 4, 8)), (1, 4, 8))
    assert options.builder_settings == BuildSettings(tf32=True, workspace=64 << 20, optimization_level=1)
    apart = tiny(Path("work"), engine="trt", batch=("1", "2:4:8"))
    assert apart.batch_profiles == options.batch_profiles
    assert tiny(Path("work"), engine="trt").batch_profiles == ((1, 8, 32),)
    exact = tiny(Path("work"), engine="trt", precision="fp32", optimization_level=5)
    assert exact.builder_settings == BuildSettings(tf32=False, workspace=None, optimization_level=5)
    assert tiny(Path("work"), engine="trt").builder_settings is None
    several = tiny(Path("work"), engine="ort,trt", batch="1,2:4:8", workspace=64)
    several.check()
    ort, trt = (several.for_engine(name) for name in ("ort", "trt"))
    assert (ort.batch_profiles, ort.builder_settings) == (((1, 8, 32),), None)
    assert trt.batch_profiles == options.batch_profiles


@pytest.mark.slow
@AHEAD_OF_TIME[0]
@AHEAD_OF_TIME[1]
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_a_device_builds_with_what_the_bundle_was_built_with(export_work: Path, tmp_path: Path) -> None:
    asked = {"batch": "1,2:4:8", "workspace": 64, "optimization_level": 1}
    outcome = export_bundle(tiny(export_work, "told", engine="trt", target=("sm89",), **asked))
    recipe = read(outcome.bundle / "recipe.json")
    assert recipe["profiles"] == [{"min": 1, "opt": 1, "max": 1}, {"min": 2, "opt": 4, "max": 8}]
    assert (recipe["settings"]["workspace_mib"], recipe["settings"]["optimization_level"]) == (64, 1)
    assert outcome.engine.batch == (1, 4, 8)
    assert outcome.engine.fused_attentions == DEPTH
    assert check_bundle(outcome.bundle).passed
    built = build_recipe(RecipeBuild(outcome.bundle / "recipe.json", tmp_path / "engine"))
    assert built.result.kernels == outcome.engine.kernels
    ours = outcome.engine.files[0].read_bytes()
    assert (built.folder / built.record.engine.files[0]).read_bytes() == ours  # so it was told the same: builds are repeatable
    if cuda.local_target() is not None:
        return  # another target is built for
    build_engine(outcome.bundle, tmp_path / "by-validate", "rtx")  # what validate.run --build does first
    record = read_build(tmp_path / "by-validate")
    assert (tmp_path / "by-validate" / record.engine.files[0]).read_bytes() == ours
    assert record.kernels == outcome.engine.kernels
    plain = json.loads((outcome.bundle / "recipe.json").read_text())
    fields = {**BuildRecipe.model_validate(plain).__dict__, "settings": defaults(plain)}
    draft = BuildRecipe.model_construct(None, **fields)
    save_record(tmp_path / "recipe.json", draft.model_copy(update={"trtexec": trtexec_line(draft)}))
    shutil.copy(outcome.bundle / plain["onnx"]["path"], tmp_path)
    other = build_recipe(RecipeBuild(tmp_path / "recipe.json", tmp_path / "by-default"))
    assert (other.folder / other.record.engine.files[0]).read_bytes() != ours  # what it was told does matter


def defaults(recipe: dict[str, Any]) -> RecipeSettings:
    """The settings of ``recipe`` but for what a builder is told by default."""
    return RecipeSettings.model_validate(recipe["settings"] | {"workspace_mib": None, "optimization_level": 3})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch", "1,1:8:32"],
        ["--batch", "1", "--batch", "1:8:32"],
        ["--batch=1", "--batch=1:8:32"],
        ["--batch", "1:1:1,1:8:32"],
    ],
)
def test_profiles_are_given_with_commas_or_again(arguments: list[str]) -> None:
    parsed = parse(ExportOptions, ["--engine", "trt", *arguments], prog="export", description="")
    assert parsed.batch_profiles == ((1, 1, 1), (1, 8, 32))
