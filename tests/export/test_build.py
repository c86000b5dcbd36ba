"""A recipe executed as on a device: real TensorRT-RTX builds where PyTorch cannot be imported, and every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.build import BuildDoorOptions, run
from export.engine_from_recipe import RecipeBuild, build_recipe
from patchslim import cuda
from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.files import digest
from patchslim.packages import install_command
from tests.helpers.attacks.bundle_recipes import RECIPE_ATTACKS, damaged
from tests.helpers.attacks.bundles import Change
from tests.helpers.tensorrt_vit import AHEAD_OF_TIME, DEPTH, fp16_recipe
from tests.helpers.validate_process import BLOCKED
from tests.helpers.validate_process import run as process
from validate.built_engine import read_build
from validate.engine_file import check_engine

ENGINE = "model.fp16.sm89.engine"
#: As on a device: nothing of PyTorch, nor of what only an export needs.
ON_DEVICE = tuple(name for name in BLOCKED if name not in ("export", "tensorrt"))


def ahead_of_time(test: Callable[..., None]) -> Callable[..., None]:
    """For tests that build with TensorRT-RTX."""
    for mark in AHEAD_OF_TIME:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small typed ONNX file and its recipe for sm89."""
    return fp16_recipe(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def recipe(made: Path, tmp_path: Path) -> Path:
    """The recipe in a folder of the test's own."""
    return Path(shutil.copytree(made, tmp_path / "bundle")) / "recipe.json"


def edit(recipe: Path, change: Change) -> None:
    damaged(recipe, change)


@ahead_of_time
def test_a_device_builds_its_engine_without_pytorch(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "built"
    done = process(recipe, "-o", out, "--json", module="export.build", blocked=ON_DEVICE)
    assert done.code == 0, done.err
    assert {path.name for path in out.iterdir()} == {ENGINE, "build.json", "engine_layers.json"}
    record = read_build(out)
    assert json.loads(done.out) == json.loads((out / "build.json").read_text())
    assert (record.engine.backend, record.engine.targets, record.engine.files) == ("tensorrt_rtx", ["sm89"], [ENGINE])
    assert (record.engine.fused_attentions, record.engine.attentions, record.engine.precision) == (DEPTH, DEPTH, "fp16")
    assert record.recipe_sha256 == digest(recipe)
    assert record.onnx_sha256 == digest(recipe.parent / "model.fp16.onnx")
    assert record.executed is False or cuda.local_target() is not None
    assert record.tools["tensorrt-rtx-cu13"].startswith(record.engine.version)
    engine = record.engine_for("sm89")
    assert engine is not None
    assert engine.sha256 == digest(out / ENGINE)
    check_engine(out / ENGINE, "tensorrt_rtx")
    kernels = json.loads((out / "engine_layers.json").read_text())["sm89"]["kernels"]
    assert sum(kernel["type"] != "shape_call" for kernel in kernels) == record.kernels["sm89"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "bundle"]


@pytest.mark.slow
@ahead_of_time
def test_a_build_takes_the_place_of_an_earlier_one(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "built"
    assert run(BuildDoorOptions(recipe, out, engine="rtx", target=("sm89",))) == 0
    before = read_build(out)
    assert run(BuildDoorOptions(recipe, out, engine="rtx", target=("sm86,sm89",))) == 0
    again = read_build(out)
    assert again.engine.targets == ["sm86", "sm89"]
    assert again.engine_for("sm89") == before.engine_for("sm89")  # byte for byte
    told = capsys.readouterr().out
    assert f"{DEPTH} of {DEPTH} attentions fused" in told
    assert f"{again.files[0].sha256}  {out / again.files[0].path}" in told
    assert f"python -m validate.run {recipe.parent} --build --built {out} --data IMAGES" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "bundle"]


@ahead_of_time
def test_fewer_fused_attentions_than_expected_are_exit_5(recipe: Path, tmp_path: Path) -> None:
    """The same graph in FP32, of which TensorRT-RTX fuses no attention."""
    edit(recipe, lambda r: _to_fp32(recipe, r))
    done = process(recipe, "-o", tmp_path / "built", module="export.build", blocked=ON_DEVICE)
    assert done.code == 5, done.err
    assert f"0 of {DEPTH} attentions are one kernel, and the recipe expects {DEPTH}" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def _to_fp32(recipe: Path, record: dict[str, Any]) -> None:
    """Let the recipe be of the FP32 file, with the promise of the FP16 one."""
    onnx = recipe.parent / "model.onnx"
    record["onnx"] = {"path": onnx.name, "size": onnx.stat().st_size, "sha256": digest(onnx)}
    record["settings"].update(precision="fp32", tf32=False)
    record["expected"].update(precision="fp32")
    line = record["trtexec"].replace("model.fp16", "model")
    record["trtexec"] = line.replace(" --builderOpt", " --noTF32 --builderOpt")


@pytest.mark.parametrize(("change", "words"), [(c, w) for _, c, w in RECIPE_ATTACKS], ids=[n for n, *_ in RECIPE_ATTACKS])
def test_a_hostile_recipe_is_refused_before_anything_is_loaded(
    change: Change | str, words: tuple[str, ...], recipe: Path, tmp_path: Path
) -> None:
    damaged(recipe, change)
    with pytest.raises(InputRejected) as refused:
        build_recipe(RecipeBuild(recipe, tmp_path / "built"))
    for word in ("recipe.json", *words):
        assert word in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def other_bytes(recipe: Path) -> None:
    onnx = recipe.parent / "model.fp16.onnx"
    data = bytearray(onnx.read_bytes())
    data[-1] ^= 1
    onnx.write_bytes(data)


def longer(recipe: Path) -> None:
    with (recipe.parent / "model.fp16.onnx").open("ab") as file:
        file.write(b"\0")


def a_link(recipe: Path) -> None:
    onnx = recipe.parent / "model.fp16.onnx"
    onnx.rename(recipe.parent / "elsewhere.onnx")
    onnx.symlink_to(recipe.parent / "elsewhere.onnx")


def missing(recipe: Path) -> None:
    (recipe.parent / "model.fp16.onnx").unlink()


def no_onnx(recipe: Path) -> None:
    """A file that is none, with its right digest."""
    onnx = recipe.parent / "model.fp16.onnx"
    onnx.write_bytes(b"not onnx")
    edit(recipe, lambda r: r["onnx"].update(size=8, sha256=digest(onnx)))


def more_attentions(recipe: Path) -> None:
    edit(recipe, lambda r: r["expected"].update(attentions=DEPTH + 1))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (other_bytes, "SHA-256"),
        (longer, "SHA-256"),
        (a_link, "model.fp16.onnx"),
        (missing, "cannot be read as the ONNX file"),
        (no_onnx, "not an ONNX file"),
        (more_attentions, "attentions"),
        (lambda recipe: recipe.unlink(), "is missing"),
    ],
)
def test_another_onnx_file_is_refused(damage: Callable[[Path], None], word: str, recipe: Path, tmp_path: Path) -> None:
    damage(recipe)
    with pytest.raises(InputRejected, match=word):
        build_recipe(RecipeBuild(recipe, tmp_path / "built", targets=["sm89"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_digests_come_before_packages(recipe: Path, tmp_path: Path) -> None:
    """A device without ONNX and TensorRT refuses another file all the same; of the right one it says what to install."""
    none = (*ON_DEVICE, "tensorrt", "tensorrt_rtx", "onnx")
    done = process(recipe, "-o", tmp_path / "built", module="export.build", blocked=none)
    assert done.code == 4, done.err
    assert install_command("rtx") in done.err
    assert install_command("trt") in done.err
    other_bytes(recipe)
    done = process(recipe, "-o", tmp_path / "built", module="export.build", blocked=none)
    assert done.code == 3, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.mark.skipif(cuda.local_target() is not None, reason="a GPU is visible: full TensorRT may build for it")
def test_full_tensorrt_is_asked_for_where_it_cannot_build(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"TensorRT is not installed|nothing on a machine without a GPU"):
        build_recipe(RecipeBuild(recipe, tmp_path / "built", backend="tensorrt"))
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize("name", ["notes.txt", "build.json"])
def test_what_is_no_earlier_build_is_not_replaced(name: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / name).write_text("mine")
    with pytest.raises(UsageError, match="holds something else than an earlier build"):
        build_recipe(RecipeBuild(recipe, tmp_path / "built"))
    assert (tmp_path / "built" / name).read_text() == "mine"


@ahead_of_time
def test_an_export_writes_a_recipe_that_builds_its_own_engine(trt_export: Any, tmp_path: Path) -> None:
    bundle = trt_export.bundle
    built = build_recipe(RecipeBuild(bundle / "recipe.json", tmp_path / "built", targets=["sm89"]))
    assert built.doubt == ""
    assert digest(tmp_path / "built" / ENGINE) == digest(bundle / "engine" / ENGINE)
    assert (tmp_path / "built" / "engine_layers.json").read_bytes() == (bundle / "engine_layers.json").read_bytes()
