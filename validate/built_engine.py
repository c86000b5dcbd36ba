"""``build.json``: what a build recipe came to on a device, beside the engine that it speaks of. Free of ONNX and torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from patchslim.device import Device
from patchslim.errors import InputRejected
from patchslim.files import digest, read_bounded
from patchslim.records import StrictRecord, VersionOne, parse_record
from patchslim.targets import target_for
from validate.bundle import list_files
from validate.engine_file import check_engine
from validate.manifest import FileRecord
from validate.parity_records import EngineRecord

BUILD = "build.json"
_MAX_BYTES, _WHAT = 1 << 20, "record of a build"
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, le=1 << 31)]


class BuildRecord(StrictRecord):
    """An engine that was built of a recipe: ``engine``, ``tools`` and ``files`` are as a manifest has them."""

    schema_version: VersionOne = 1
    recipe_sha256: _Sha256
    onnx_sha256: _Sha256
    engine: EngineRecord = Field(
        description="status 'not executed': no labelled image has gone through it; validate.run does that"
    )
    tools: dict[str, str] = Field(description="versions on the device that built it")
    device: Device
    executed: bool = Field(description="whether it ran once, on blank images, where it was built")
    reason: Annotated[str, Field(max_length=4096)] = Field(default="", description="why it did not")
    kernels: dict[str, _Count] = Field(default_factory=dict, description="by target; empty where the backend does not say")
    files: list[FileRecord] = Field(min_length=1, description="every file but build.json, sorted by path")

    @model_validator(mode="after")
    def _check(self) -> BuildRecord:
        names = [file.path for file in self.files]
        if len(set(names)) != len(names) or BUILD in names:
            raise ValueError("files: a path is listed twice, or build.json lists itself")
        if missing := [name for name in self.engine.files if name not in names]:
            raise ValueError(f"files: lacks {missing[0]}")
        if not self.engine.files or len(self.engine.files) != len(self.engine.targets):
            raise ValueError("engine: needs one file per target")
        return self

    def engine_for(self, target: str) -> FileRecord | None:
        """The engine that runs on a GPU of the generation ``target``; None where there is none."""
        able = target_for(target, self.engine.targets)
        path = dict(zip(self.engine.targets, self.engine.files, strict=True)).get(able or "")
        return next((file for file in self.files if file.path == path), None)


def read_build(folder: Path) -> BuildRecord:
    """The record of a built engine, whose files are all there, whole, and what it says; raises ``InputRejected``."""
    path = folder / BUILD
    data = read_bounded(path, _MAX_BYTES, _WHAT, follow=False)
    record = parse_record(data, BuildRecord, _WHAT, path)
    present, listed = set(list_files(folder)) - {BUILD}, {file.path for file in record.files}
    if present != listed:
        name = min(present ^ listed)
        raise InputRejected(f"{folder / name}: is {'not listed in' if name in present else 'missing, but listed in'} {BUILD}")
    for file in record.files:
        if (folder / file.path).stat().st_size != file.size or digest(folder / file.path) != file.sha256:
            raise InputRejected(f"{folder / file.path}: its size or SHA-256 is not the one in {BUILD}: corrupt or replaced")
    for name in record.engine.files:
        check_engine(folder / name, record.engine.backend)
    return record


def recipe_digest(folder: Path) -> str:
    """SHA-256 of a bundle's ``recipe.json``; raises ``InputRejected`` where it has none."""
    from validate.build_recipe import MAX_RECIPE_BYTES, RECIPE

    return hashlib.sha256(read_bounded(folder / RECIPE, MAX_RECIPE_BYTES, "build recipe", follow=False)).hexdigest()


def build_schema() -> dict[str, object]:
    """The JSON Schema of ``build.json``."""
    return BuildRecord.model_json_schema()
