"""A build recipe executed on the device that the engine is for: digests first, then the engine, then what it came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.engines.base import BackendName, BuildOptions, BuildProgressCallback, BuildSettings, EngineResult
from export.engines.onnx_info import OnnxFacts, read_onnx
from export.engines.tensorrt_build import build, check_settings, choose_backend
from export.publication import check_place, publish_folder
from patchslim import cuda
from patchslim.device import device_versions, this_device
from patchslim.errors import InputRejected, ParityFailed
from patchslim.files import copy_verified
from patchslim.records import save_record
from patchslim.work_folder import tensorrt_cache
from validate.build_recipe import BuildRecipe, onnx_of, read_recipe
from validate.built_engine import BUILD, BuildRecord, read_build
from validate.bundle import list_files, record_files

_MIB = 1 << 20


@dataclass(frozen=True)
class RecipeBuild:
    """What to build, where to put it, and by what: None leaves backend and targets to this machine and the recipe.

    ``refit`` and ``strip_weights`` ask for them where the recipe does not.
    """

    recipe: Path
    output: Path
    backend: BackendName | None = None
    targets: Sequence[str] = ()
    refit: bool = False
    strip_weights: bool = False


@dataclass(frozen=True)
class BuiltEngine:
    """A finished build: ``folder`` holds the engine, its layers and ``build.json``, which ``record`` is."""

    folder: Path
    record: BuildRecord
    result: EngineResult
    expected_fused: int | None

    @property
    def doubt(self) -> str:
        """What could not be shown of the engine; "" where everything could."""
        if self.expected_fused and self.result.fused_attentions is None:
            return f"{self.result.backend} does not say which attentions it fused, and the recipe expects {self.expected_fused}"
        return ""


def build_recipe(asked: RecipeBuild, progress: BuildProgressCallback = lambda report: None) -> BuiltEngine:
    """Build what a recipe says, and publish it in ``asked.output`` whole or not at all. Loads neither torch nor timm.

    The ONNX file is copied while its digest is taken, so that what was checked is what is built; nothing is loaded before that.
    Without targets an engine is built for this machine's GPU, where there is none for those that the recipe names.

    Raises ``InputRejected`` where the recipe is malformed, or its ONNX file is another one, leads out of its folder or is not
    what it says; ``UsageError`` where the output cannot be written, or holds anything but an earlier build; ``Unavailable``
    where TensorRT and TensorRT-RTX are not here, or cannot build this here; ``ParityFailed`` where the engine has fewer fused
    attentions than the recipe expects: then nothing is published.
    """
    recipe, digest = read_recipe(asked.recipe)
    source = onnx_of(recipe, asked.recipe)
    check_place(asked.output, _foreign)
    done: list[tuple[BuildRecord, EngineResult]] = []

    def fill(new: Path) -> None:
        copied = new.parent / source.name
        copy_verified(source, recipe.onnx.size, recipe.onnx.sha256, copied)
        result = _built(copied, new, asked, recipe, progress)
        record = _record(recipe, digest, result, new)
        save_record(new / BUILD, record)
        done.append((record, result))

    publish_folder(fill, asked.output, _foreign)
    ((record, result),) = done
    return BuiltEngine(asked.output, record, result, recipe.expected.fused_attentions)


def _built(onnx: Path, folder: Path, asked: RecipeBuild, recipe: BuildRecipe, progress: BuildProgressCallback) -> EngineResult:
    """The engine in ``folder`` of the copy ``onnx``, as fused as the recipe expects."""
    expected = recipe.expected
    backend = choose_backend(_targets(asked, recipe), expected.precision, asked.backend)
    settings = _builder_settings(asked, recipe)
    check_settings(backend, settings)
    facts = read_onnx(onnx)
    _check_facts(facts, recipe, asked.recipe.parent / recipe.onnx.path)
    profiles = [(one.min, one.opt, one.max) for one in recipe.profiles]
    options = BuildOptions(
        backend.targets,
        expected.precision,
        recipe.batch,
        progress,
        backend.name,
        settings,
        profiles=profiles,
        cache=tensorrt_cache(),
    )
    result = build(onnx, folder, facts, options)
    fused, least = result.fused_attentions, expected.fused_attentions
    if fused is not None and least is not None and fused < least:
        raise ParityFailed(
            f"{asked.output} is not written: {fused} of {result.attentions} attentions are one kernel, and the recipe "
            f"expects {least}: {result.backend} {result.version} for {', '.join(result.targets)} builds a slower engine",
            next_step=f"use a release like {_release(recipe)}, with which the recipe was made",
        )
    return result


def _foreign(folder: Path) -> str:
    """What in ``folder`` is not of an earlier build, and so would be lost with it; "" if nothing is."""
    try:
        if list_files(folder):
            read_build(folder)
    except (InputRejected, OSError) as error:
        return f"holds something else than an earlier build ({error})"
    return ""


def _targets(asked: RecipeBuild, recipe: BuildRecipe) -> Sequence[str] | None:
    if asked.targets:
        return asked.targets
    local = cuda.local_target()
    return [local] if local is not None else recipe.settings.compute_capabilities or None


def _builder_settings(asked: RecipeBuild, recipe: BuildRecipe) -> BuildSettings:
    settings = recipe.settings
    return BuildSettings(
        tf32=settings.tf32,
        workspace=None if settings.workspace_mib is None else settings.workspace_mib * _MIB,
        optimization_level=settings.optimization_level,
        refit=settings.refit or asked.refit,
        strip_weights=settings.strip_weights or asked.strip_weights,
    )


def _check_facts(facts: OnnxFacts, recipe: BuildRecipe, path: Path) -> None:
    """Raise ``InputRejected`` where the ONNX file is not of the form that the recipe states."""
    stated = {
        "input": (facts.input_name, recipe.input.name),
        "image shape": (facts.image_shape, recipe.image_shape),
        "fixed batch": (facts.fixed_batch, None if recipe.profiles else recipe.batch[0]),
        "attentions": (len(facts.attentions), recipe.expected.attentions),
        "precision": (facts.precision or recipe.expected.precision, recipe.expected.precision),
    }
    for what, (found, said) in stated.items():
        if found != said:
            raise InputRejected(f"{path}: {what}: {found}, and the recipe says {said}")


def _release(recipe: BuildRecipe) -> str:
    named = [f"{name} {version}" for name, version in recipe.tools.items() if name.startswith("tensorrt")]
    return " or ".join(named) or "the one"


def _record(recipe: BuildRecipe, digest: str, result: EngineResult, folder: Path) -> BuildRecord:
    assert result.backend != "onnxruntime"
    return BuildRecord(
        recipe_sha256=digest,
        onnx_sha256=recipe.onnx.sha256,
        engine=result.record([file.name for file in result.files], "not executed", recipe.onnx.path),
        tools=device_versions(),
        device=this_device(),
        executed=result.executed,
        reason=result.reason[:4096],
        kernels=result.kernels,
        files=record_files(folder),
    )
