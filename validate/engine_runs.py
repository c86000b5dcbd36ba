"""What a bundle's models are run in on this machine, and what each run came to: the engines of an attestation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from patchslim import cuda
from patchslim.choices import PerformanceHint
from patchslim.errors import InputRejected, Unavailable
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.packages import PACKAGES, install_command, missing
from patchslim.records import StrictRecord
from validate.fields import PlainPath, Status
from validate.manifest import FileRecord, Manifest
from validate.parity_records import EngineRecord, Rung

EngineKey = Literal["ort", "openvino", "trt", "rtx"]
#: The module that runs each, which is also its name in manifests.
BACKENDS: dict[EngineKey, str] = {
    "ort": "onnxruntime",
    "openvino": "openvino",
    "trt": "tensorrt",
    "rtx": "tensorrt_rtx",
}
#: Those that run the ONNX files themselves; the others run engines that were built of them.
ON_ONNX: tuple[EngineKey, ...] = ("ort", "openvino")
_EXTRAS: dict[EngineKey, str] = {"ort": "edge", "openvino": "openvino", "trt": "trt", "rtx": "rtx"}

#: wall: all of a call. gpu: between two events around it, without copies.
Clock = Literal["wall", "gpu"]
_Text = Annotated[str, Field(max_length=4096)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, le=1 << 31)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """What the models are run in: ``keys`` None is all that runs here.

    ``built`` is a folder that ``export.build`` wrote, whose engine is run in place of the bundle's. ``latency`` is for how many
    seconds each batch size is timed; 0: not at all. ``hint`` is what OpenVINO is told; None: what the manifest says.
    """

    keys: tuple[EngineKey, ...] | None = ("ort",)
    built: Path | None = None
    latency: float = 0.0
    hint: PerformanceHint | None = None

    def told(self, subject: Subject) -> OpenVinoSettings:
        """What OpenVINO is told to run ``subject``."""
        return dataclasses.replace(subject.openvino, hint=self.hint or subject.openvino.hint)

    def has(self, key: EngineKey) -> bool:
        """Whether models may be run in ``key``."""
        return self.keys is None or key in self.keys

    def beside_onnxruntime(self) -> list[EngineKey]:
        """Which other engines are here. Raises ``Unavailable`` where one was asked for by name and is not."""
        found: list[EngineKey] = []
        for key in BACKENDS:
            if key == "ort" or not self.has(key):
                continue
            if not (reason := why_not(key)):
                found.append(key)
            elif self.keys is not None:
                raise Unavailable(f"--engine {key}: {reason}")
        return found


def why_not(key: EngineKey) -> str:
    """Why an engine cannot run here; "" where it can. Nothing is imported."""
    needed = [BACKENDS[key], *(["onnx"] if key in ON_ONNX else [])]
    if absent := missing(needed):
        extras = dict.fromkeys("edge" if module == "onnx" else _EXTRAS[key] for module in absent)
        are = "are" if len(absent) > 1 else "is"
        return f"{' and '.join(absent)} {are} not installed; install it: {' and '.join(map(install_command, extras))}"
    if key not in ON_ONNX and cuda.local_target() is None:
        return "no CUDA driver or no visible GPU on this machine"
    return ""


def version_of(key: EngineKey) -> str:
    """The installed version of an engine; nothing is imported."""
    return next((package.version for package in PACKAGES if package.module == BACKENDS[key]), None) or "unknown"


class GoldenParity(StrictRecord):
    """Answers to the golden inputs against those of the PyTorch slim model."""

    images: _Count
    non_finite: _Count = Field(description="logits that are NaN or infinite")
    max_error: _Error | None = Field(description="largest difference of a logit; null where one is NaN or infinite")
    tolerance: _Error = Field(description="largest max_error allowed")
    agreement: _Percent = Field(description="percent of images with the same top-1")
    min_agreement: _Percent

    @property
    def passed(self) -> bool:
        """Whether the answers are those that they should be."""
        near = self.max_error is not None and self.max_error <= self.tolerance
        return near and self.agreement >= self.min_agreement and not self.non_finite and self.images > 0

    def described(self) -> str:
        """In one line."""
        if self.max_error is None:
            return f"{self.non_finite} of its logits on the golden inputs are NaN or infinite"
        return (
            f"max error {self.max_error:.3g} of {self.tolerance:.3g} allowed, "
            f"top-1 agreement {self.agreement:g} % of {self.min_agreement:g} % needed"
        )


class LatencyPoint(StrictRecord):
    """How long one batch takes, after a warm-up, again and again."""

    batch: Annotated[int, Field(ge=1, le=1 << 16)]
    runs: Annotated[int, Field(ge=1, le=1 << 24)]
    p50_ms: _Positive = Field(description="median time of a batch, milliseconds")
    p90_ms: _Positive | None = Field(description="90th percentile; null for fewer than 10 runs")
    p99_ms: _Positive | None = Field(description="99th percentile; null for fewer than 100 runs")
    images_per_second: _Positive = Field(description="images of all runs by the time of all runs")
    clock: Clock = Field(description="wall: all of a call. gpu: between two events around it, without copies")

    @model_validator(mode="after")
    def _check(self) -> LatencyPoint:
        if (self.p90_ms or self.p50_ms) < self.p50_ms or (self.p99_ms or self.p90_ms or self.p50_ms) < (self.p90_ms or 0):
            raise ValueError("p50_ms, p90_ms, p99_ms: must rise")
        return self


class EngineRun(StrictRecord):
    """A model file of a bundle in one engine on one machine."""

    engine: EngineKey
    version: _Text
    on: _Text = Field(description="what it ran on: an execution provider, a processor with its precision, a GPU generation")
    threads: _Count = Field(description="threads of the CPU; 0: left to the engine")
    file: PlainPath = Field(description="in the bundle or, where it was built on this machine, beside build.json")
    sha256: _Sha256
    recipe_sha256: _Sha256 | None = Field(default=None, description="of the recipe that it was built by on this machine")
    status: Status
    detail: _Text = ""
    golden: GoldenParity | None = None
    accuracy: Rung | None = Field(default=None, description="on labelled images of the device; null where none were given")
    latency: list[LatencyPoint] = Field(default_factory=list, max_length=64)

    @model_validator(mode="after")
    def _check(self) -> EngineRun:
        right = self.golden is not None and self.golden.passed
        if (self.status == "passed") != right:
            raise ValueError(f"status: {self.status!r}, and by its golden answers it has {'' if right else 'not '}passed")
        return self


@dataclasses.dataclass(frozen=True)
class OnnxWeights:
    """The ONNX file that an engine is given its weights from: ``path`` in ``folder``, of whose ``files`` it is one."""

    folder: Path
    path: str
    files: list[FileRecord]

    @classmethod
    def of_engine(cls, engine: EngineRecord, folder: Path, manifest: Manifest) -> OnnxWeights | None:
        """What an ``engine`` of the bundle in ``folder`` needs, or one that was built of it; None: it has its own weights.

        Raises ``InputRejected`` where the bundle has no such file.
        """
        if engine.weights_from is None:
            return None
        if engine.weights_from not in [record.path for record in manifest.onnx]:
            raise InputRejected(f"{folder}: has no {engine.weights_from}, which the engine is to be given its weights from")
        return cls(folder, engine.weights_from, manifest.files)

    def listed(self) -> dict[str, object]:
        """What ``open_model`` is told of it."""
        files = [(file.path, file.size, file.sha256) for file in self.files]
        return {"folder": str(self.folder.absolute()), "path": self.path, "files": files}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A file to run: in ``engine``, out of ``folder``, of whose ``files`` it is one.

    ``weights`` is what an engine file without weights is given them from; None: it has its own.
    """

    engine: EngineKey
    folder: Path
    path: str
    files: list[FileRecord]
    recipe_sha256: str | None = None
    openvino: OpenVinoSettings = dataclasses.field(default_factory=OpenVinoSettings)
    weights: OnnxWeights | None = None

    @property
    def sha256(self) -> str:
        """The digest that the file must have."""
        return next(file.sha256 for file in self.files if file.path == self.path)
