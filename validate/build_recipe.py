"""``recipe.json``: how a device builds its own engine of a bundle's ONNX file. Free of numpy, ONNX and torch."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from patchslim.choices import Precision
from patchslim.errors import InputRejected
from patchslim.files import open_regular, read_bounded
from patchslim.records import StrictRecord, VersionOne, parse_record
from validate.manifest import FileRecord, TensorSpec

RECIPE = "recipe.json"
#: A recipe of more bytes is refused.
MAX_RECIPE_BYTES = 1 << 20
#: Optimisation profiles of one engine.
MAX_PROFILES = 8

_Batch = Annotated[int, Field(ge=1, le=1 << 16)]
_Target = Annotated[str, Field(pattern=r"^sm[1-9][0-9]{1,2}$")]


class BatchProfile(StrictRecord):
    """An optimisation profile: the batch sizes that one engine takes, of which it is fastest at ``opt``."""

    min: _Batch
    opt: _Batch
    max: _Batch

    @model_validator(mode="after")
    def _check(self) -> BatchProfile:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"{self.min}, {self.opt}, {self.max}: must be min <= opt <= max")
        return self


class BuildSettings(StrictRecord):
    """What the builder is told. Engines are strongly typed: every value has the type that the ONNX file gives it."""

    precision: Precision = Field(description="the type of most weights in the ONNX file")
    tf32: bool = Field(description="whether float32 products may be rounded to TF32; never in an fp32 engine")
    workspace_mib: Annotated[int, Field(ge=1, le=1 << 20)] | None = Field(
        description="most memory that a kernel may use beside weights and activations; null: what the GPU has"
    )
    optimization_level: Annotated[int, Field(ge=0, le=5)] = Field(
        description="0 builds fastest, 5 tries most; 3 is the default"
    )
    refit: bool = Field(default=False, description="whether the engine can be given other weights; written where it is true")
    strip_weights: bool = Field(
        default=False,
        description="whether the engine file is without weights, which it is given from the ONNX file when it is loaded; "
        "written where it is true",
    )
    compute_capabilities: list[_Target] = Field(
        max_length=32, description="what TensorRT-RTX builds for ahead of time; full TensorRT builds for the GPU it runs on"
    )

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not asked for: so it was written, and is read, by every earlier release."""
        written: dict[str, Any] = write(self)
        return {name: value for name, value in written.items() if name not in ("refit", "strip_weights") or value}


class ExpectedEngine(StrictRecord):
    """What the engine must come to."""

    precision: Precision
    attentions: Annotated[int, Field(ge=0, le=1 << 16)] = Field(description="attentions in the ONNX file")
    fused_attentions: Annotated[int, Field(ge=0, le=1 << 16)] | None = Field(
        description="fewest of them that must be one kernel each; null: not known, since none was built where this was made"
    )


class BuildRecipe(StrictRecord):
    """Everything that a device needs to build an engine of the one ONNX file, and what it should come to."""

    schema_version: VersionOne = 1
    onnx: FileRecord = Field(description="the typed ONNX file; its path is relative to the recipe's folder")
    input: TensorSpec
    profiles: list[BatchProfile] = Field(
        max_length=MAX_PROFILES, description="one or several of one engine; none where the batch is fixed in the ONNX file"
    )
    settings: BuildSettings
    expected: ExpectedEngine
    tools: dict[str, str] = Field(description="versions of the tools that made the ONNX file and built an engine of it here")
    trtexec: Annotated[str, Field(max_length=8192)] = Field(description="the same as one command for full TensorRT, to be read")

    @model_validator(mode="after")
    def _check(self) -> BuildRecipe:
        shape = self.input.shape
        if len(shape) != 4 or "batch" in shape[1:]:
            raise ValueError(f"input: shape {shape} is not (batch, channels, height, width) with only the batch free")
        if (shape[0] == "batch") != bool(self.profiles):
            raise ValueError("profiles: there must be one where the batch is free, and none where it is fixed")
        if len({(one.min, one.opt, one.max) for one in self.profiles}) != len(self.profiles):
            raise ValueError("profiles: one is given twice")
        if self.expected.precision != self.settings.precision:
            raise ValueError("expected: precision is not the one of settings")
        if self.settings.precision == "fp32" and self.settings.tf32:
            raise ValueError("settings: tf32 rounds what an fp32 engine promises to compute in float32")
        if (self.expected.fused_attentions or 0) > self.expected.attentions:
            raise ValueError("expected: more fused attentions than there are")
        if len(set(self.settings.compute_capabilities)) != len(self.settings.compute_capabilities):
            raise ValueError("settings: compute_capabilities: one is given twice")
        if self.trtexec != (derived := trtexec_line(self)):
            raise ValueError(f"trtexec: is not what the other fields say: {derived}")
        return self

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        _, channels, height, width = self.input.shape
        return int(channels), int(height), int(width)

    @property
    def batch(self) -> tuple[int, int, int]:
        """Smallest, most usual and largest batch; the usual one is that of the profile for the largest batches."""
        if self.profiles:
            widest = max(self.profiles, key=lambda profile: profile.max)
            return min(profile.min for profile in self.profiles), widest.opt, widest.max
        return (int(self.input.shape[0]),) * 3


def make_recipe(
    *,
    onnx: FileRecord,
    spec: TensorSpec,
    batch: tuple[int, int, int],
    settings: BuildSettings,
    expected: ExpectedEngine,
    tools: dict[str, str],
    profiles: Sequence[tuple[int, int, int]] = (),
) -> BuildRecipe:
    """A recipe for the ONNX file ``onnx`` with the input ``spec``; ``batch`` is smallest, most usual and largest.

    ``profiles`` are as many optimisation profiles, in place of one of ``batch``.

    Raises ``ValueError`` where the parts contradict each other.
    """
    free = spec.shape[0] == "batch"
    fields: dict[str, Any] = {
        "onnx": onnx,
        "input": spec,
        "profiles": [BatchProfile(min=one[0], opt=one[1], max=one[2]) for one in (profiles or [batch])] if free else [],
        "settings": settings,
        "expected": expected,
        "tools": tools,
    }
    draft: BuildRecipe = BuildRecipe.model_construct(None, schema_version=1, trtexec="", **fields)
    line = trtexec_line(draft)
    return BuildRecipe.model_validate(fields | {"trtexec": line})


def trtexec_line(recipe: BuildRecipe) -> str:
    """A recipe as a command for full TensorRT's own tool, run in the recipe's folder."""
    onnx, settings = PurePosixPath(recipe.onnx.path), recipe.settings
    words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={onnx.stem}.engine", "--stronglyTyped"]
    image = "x".join(map(str, recipe.input.shape[1:]))
    for number, profile in enumerate(recipe.profiles):
        sizes = {"min": profile.min, "opt": profile.opt, "max": profile.max}
        words += [f"--profile={number}"] if len(recipe.profiles) > 1 else []
        words += [f"--{which}Shapes={recipe.input.name}:{size}x{image}" for which, size in sizes.items()]
    if not settings.tf32:
        words.append("--noTF32")
    if settings.workspace_mib is not None:
        words.append(f"--memPoolSize=workspace:{settings.workspace_mib}")
    words.append(f"--builderOptimizationLevel={settings.optimization_level}")
    words += ["--refit"] if settings.refit else []
    words += ["--stripWeights"] if settings.strip_weights else []
    words += ["--profilingVerbosity=detailed", f"--exportLayerInfo={onnx.stem}.layers.json", "--skipInference"]
    return shlex.join(words)


def read_recipe(path: Path) -> tuple[BuildRecipe, str]:
    """A recipe and the SHA-256 of its bytes; raises ``InputRejected`` naming the file and the fault."""
    data = read_bounded(path, MAX_RECIPE_BYTES, "build recipe", follow=False)
    return parse_recipe(data, path), hashlib.sha256(data).hexdigest()


def parse_recipe(data: bytes, path: Path) -> BuildRecipe:
    """``read_recipe`` of bytes that were read from ``path`` already."""
    return parse_record(data, BuildRecipe, "build recipe", path)


def onnx_of(recipe: BuildRecipe, path: Path) -> Path:
    """Where the ONNX file of a recipe at ``path`` is.

    Raises ``InputRejected`` where there is no file, or the way to it leads out of the recipe's folder.
    """
    found = path.parent / recipe.onnx.path
    if found.parent.resolve() != path.parent.resolve() / PurePosixPath(recipe.onnx.path).parent:
        raise InputRejected(f"{path}: onnx: {recipe.onnx.path} leads out of the recipe's folder through a link")
    try:
        open_regular(found, follow=False).close()
    except OSError as error:
        raise InputRejected(f"{found}: cannot be read as the ONNX file of {path.name}: {error.strerror or error}") from error
    return found


def recipe_schema() -> dict[str, object]:
    """The JSON Schema of ``recipe.json``."""
    return BuildRecipe.model_json_schema()
