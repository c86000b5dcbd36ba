"""The recipe that a device builds from: what it says, the command that it comes to, and that it stays in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from patchslim.errors import InputRejected
from tests.helpers.bundles import make_bundle, reseal
from validate import check_bundle
from validate.build_recipe import BuildRecipe, BuildSettings, ExpectedEngine, make_recipe, onnx_of, read_recipe
from validate.bundle import load_manifest
from validate.manifest import FileRecord, TensorSpec

ONNX = FileRecord(path="model.fp16.onnx", size=3, sha256="0" * 64)
FREE = TensorSpec(name="images", dtype="float32", shape=["batch", 3, 224, 224])


def recipe(spec: TensorSpec = FREE, onnx: FileRecord = ONNX, **settings: Any) -> BuildRecipe:
    fields = {
        "precision": "fp16",
        "tf32": True,
        "workspace_mib": None,
        "optimization_level": 3,
        "compute_capabilities": ["sm89"],
    }
    built = BuildSettings.model_validate(fields | settings)
    expected = ExpectedEngine(precision=built.precision, attentions=12, fused_attentions=12)
    return make_recipe(onnx=onnx, spec=spec, batch=(1, 8, 32), settings=built, expected=expected, tools={})


def test_the_command_says_the_same_as_the_fields() -> None:
    assert recipe().trtexec == (
        "trtexec --onnx=model.fp16.onnx --saveEngine=model.fp16.engine --stronglyTyped --minShapes=images:1x3x224x224 "
        "--optShapes=images:8x3x224x224 --maxShapes=images:32x3x224x224 --builderOptimizationLevel=3 "
        "--profilingVerbosity=detailed --exportLayerInfo=model.fp16.layers.json --skipInference"
    )
    strict = recipe(precision="fp32", tf32=False, workspace_mib=512, optimization_level=5).trtexec
    assert " --noTF32 --memPoolSize=workspace:512 --builderOptimizationLevel=5 " in strict
    assert " --builderOptimizationLevel=3 --refit --stripWeights " in recipe(refit=True, strip_weights=True).trtexec


def test_what_earlier_releases_do_not_know_is_written_where_it_is_asked_for() -> None:
    plain, stripped = (recipe(**asked).model_dump(mode="json")["settings"] for asked in ({}, {"strip_weights": True}))
    assert not {"refit", "strip_weights"} & {*plain}
    assert {name: stripped[name] for name in stripped if name not in plain} == {"strip_weights": True}
    assert BuildSettings.model_validate(stripped).strip_weights


def test_several_profiles_are_one_engine() -> None:
    fields = {"onnx": ONNX, "spec": FREE, "settings": recipe().settings, "expected": recipe().expected, "tools": {}}
    made = make_recipe(batch=(1, 8, 32), profiles=[(1, 1, 1), (2, 8, 32)], **fields)  # type: ignore[arg-type]
    assert [(one.min, one.opt, one.max) for one in made.profiles] == [(1, 1, 1), (2, 8, 32)]
    assert made.batch == (1, 8, 32)
    assert "--profile=0 --minShapes=images:1x3x224x224" in made.trtexec
    assert "--profile=1 --minShapes=images:2x3x224x224" in made.trtexec
    with pytest.raises(ValidationError, match="profiles: one is given twice"):
        make_recipe(batch=(1, 8, 32), profiles=[(1, 1, 1), (1, 1, 1)], **fields)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="at most 8 items"):
        make_recipe(batch=(1, 8, 32), profiles=[(size, size, size) for size in range(1, 10)], **fields)  # type: ignore[arg-type]


def test_a_fixed_batch_has_no_profile() -> None:
    made = recipe(TensorSpec(name="images", dtype="float32", shape=[4, 3, 224, 224]))
    assert (made.profiles, made.batch, made.image_shape) == ([], (4, 4, 4), (3, 224, 224))
    assert "Shapes" not in made.trtexec


def test_a_name_that_a_shell_would_obey_is_quoted() -> None:
    made = recipe(TensorSpec(name="$(rm -rf ~)", dtype="float32", shape=["batch", 3, 8, 8]))
    assert "'--minShapes=$(rm -rf ~):1x3x8x8'" in made.trtexec


def test_a_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    found, _ = read_recipe(bundle / "recipe.json")
    assert onnx_of(found, bundle / "recipe.json") == bundle / "model.onnx"
    assert found.onnx in load_manifest(bundle).files
    assert found.batch == (1, 4, 8)
    with pytest.raises(ValidationError, match="trtexec: is not what the other fields say"):
        BuildRecipe.model_validate(found.model_dump() | {"trtexec": "true"})


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_link_out_of_the_folder_is_not_followed(linked: str, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (outside / "model.onnx").write_bytes(b"abc")
    made = recipe(onnx=FileRecord(path="in/model.onnx", size=3, sha256="0" * 64))
    if linked == "folder":
        (folder / "in").symlink_to(outside)
    else:
        (folder / "in").mkdir()
        (folder / "in" / "model.onnx").symlink_to(outside / "model.onnx")
    with pytest.raises(InputRejected, match=r"through a link|is a link|cannot be read"):
        onnx_of(made, folder / "recipe.json")


def test_a_bundle_of_before_there_were_recipes_is_valid(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "recipe.json").unlink()
    reseal(bundle)
    assert check_bundle(bundle).passed


def test_a_recipe_that_promises_other_fusions_than_the_manifest(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    engine = load_manifest(bundle).engine.model_copy(update={"attentions": 4})
    reseal(bundle, engine=engine)
    parity = json.loads((bundle / "parity.json").read_text())
    parity["engine"]["attentions"] = 4
    (bundle / "parity.json").write_text(json.dumps(parity))
    reseal(bundle, engine=engine)
    verdict = check_bundle(bundle)
    assert (verdict.exit_code, len(verdict.faults)) == (3, 1)
    assert "recipe.json: expected.attentions: 0, and manifest.json says 4" in verdict.faults[0]
