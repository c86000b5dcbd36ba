"""The options of ``python -m validate.run``: names, defaults and help in one place. Cheap to import."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated

import tyro

from patchslim.choices import PerformanceHint
from patchslim.errors import UsageError
from validate.engine_runs import EngineChoice, EngineKey


@dataclasses.dataclass(frozen=True)
class BundleGroup:
    """What is checked."""

    bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BUNDLE")]
    """The bundle's folder."""


@dataclasses.dataclass(frozen=True)
class ImageGroup:
    """Images to measure the bundle on as well."""

    images: Annotated[Path | None, tyro.conf.arg(aliases=["--data"])] = None
    """A folder of images to measure top-1 and top-5 on as well: one subfolder per class, named as in the bundle's labels."""
    batch: int = 8
    """Images per run when --images is measured."""
    min_top1: Annotated[float | None, tyro.conf.arg(metavar="PERCENT")] = None
    """Fail with exit code 5 where top-1 on --images is less than this."""
    max_top1_drop: Annotated[float | None, tyro.conf.arg(metavar="POINTS")] = None
    """Fail with exit code 5 where top-1 on --images is more than this below the bundle's own."""


@dataclasses.dataclass(frozen=True)
class EngineGroup:
    """What the models are run in."""

    engine: tyro.conf.UseAppendAction[tuple[EngineKey, ...]] = ()
    """ort: ONNX Runtime. openvino: OpenVINO on the CPU, in float32. trt, rtx: an engine for TensorRT or TensorRT-RTX on this
    machine's GPU. May be given again. Default: all that run here."""
    build: bool = False
    """Build an engine by the bundle's recipe.json first, with TensorRT or TensorRT-RTX, and run that one."""
    built: Path | None = None
    """The folder that --build writes the engine to, or finds it in from an earlier time. Default: BUNDLE-built."""
    latency_seconds: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 1.0
    """How long each of the batch sizes 1, 8 and 32 is timed in each engine; 0 times none."""
    hint: PerformanceHint | None = None
    """What OpenVINO is told: to give all cores to one batch (latency), or to run several at once (throughput). Default: what
    the manifest says of an IR, latency for an ONNX file."""
    provider: str | None = None
    """ONNX Runtime's execution provider. Default: CPUExecutionProvider; without ONNX Runtime no model is run in it."""
    threads: int = 0
    """Threads of ONNX Runtime and OpenVINO; 0 leaves the choice to them."""


@dataclasses.dataclass(frozen=True)
class OutputGroup:
    """What is printed."""

    json: bool = False
    """Print one JSON object instead of tables: the attestation that the sender of the bundle can check."""
    attestation: Path | None = None
    """Check what a device sent back (its --json output) against this bundle instead: that it is of it, and passed."""


@dataclasses.dataclass(frozen=True)
class TrustGroup:
    """What is not believed. The digests in manifest.json prove that the files are whole and belong together, and nothing
    against one who can write the folder and so the manifest too: only a manifest's digest or a public key that came another
    way does."""

    expect_manifest_sha256: Annotated[str | None, tyro.conf.arg(metavar="HEX")] = None
    """SHA-256 that manifest.json must have, from whoever made the bundle; any other is refused with exit code 3."""
    public_key: Annotated[Path | None, tyro.conf.arg(metavar="KEY")] = None
    """The public key (PEM) of whoever made the bundle, which came another way: the bundle must carry their signature."""
    require_executed: bool = False
    """Fail with exit code 5 where the engine never ran on the machine that built it, and with 4 where anything of the bundle
    cannot be checked here."""
    timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 300.0
    """Seconds that a model may take to load and answer the golden inputs, or a batch of --images; then it is ended."""
    memory: Annotated[float | None, tyro.conf.arg(metavar="GIB")] = None
    """GiB of memory that a model may take on the CPU; 0 is no bound. Default: 4, and four times the bundle's size."""


@dataclasses.dataclass(frozen=True)
class ValidateOptions(OutputGroup, TrustGroup, EngineGroup, ImageGroup, BundleGroup):
    """Check a patchslim bundle whole: digests, contracts, and the models' answers to the golden inputs in every engine here."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if self.threads < 0 or self.batch < 1:
            raise UsageError("--threads must not be negative, --batch must be at least 1")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise UsageError(f"--timeout {self.timeout}: must be a positive number of seconds")
        if self.memory is not None and not 0 <= self.memory <= 1 << 20:
            raise UsageError(f"--memory {self.memory}: must be GiB, or 0 for no bound")
        for option, value in (("--min-top1", self.min_top1), ("--max-top1-drop", self.max_top1_drop)):
            if value is not None and self.images is None:
                raise UsageError(f"{option} needs --images, a folder of images to measure")
            if value is not None and not 0 <= value <= 100:
                raise UsageError(f"{option} {value}: must be from 0 to 100")
        if not (math.isfinite(self.latency_seconds) and 0 <= self.latency_seconds <= 3600):
            raise UsageError(f"--latency-seconds {self.latency_seconds}: must be from 0 to 3600")
        if self.built is not None and not self.build:
            raise UsageError(f"--built {self.built} needs --build")
        if self.build and self.engine and not {"trt", "rtx"} & set(self.engine):
            raise UsageError(f"--build makes an engine for trt or rtx, and --engine {' '.join(self.engine)} runs none")
        if self.hint is not None and self.engine and "openvino" not in self.engine:
            raise UsageError(f"--hint {self.hint} is for --engine openvino, and --engine {' '.join(self.engine)} runs none")
        if self.attestation is not None and (self.images or self.build or self.engine or self.provider or self.hint):
            raise UsageError("--attestation runs no model: leave out --images, --engine, --build, --provider and --hint")
        sha256 = self.expect_manifest_sha256
        if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
            raise UsageError(f"--expect-manifest-sha256 {sha256}: must be 64 hexadecimal digits, as sha256sum prints them")

    @property
    def choice(self) -> EngineChoice:
        """The engines that are asked for."""
        return EngineChoice(tuple(dict.fromkeys(self.engine)) or None, latency=self.latency_seconds, hint=self.hint)

    @property
    def built_folder(self) -> Path:
        """``--built``, or its default."""
        return self.built or self.bundle.with_name(f"{self.bundle.resolve().name}-built")
