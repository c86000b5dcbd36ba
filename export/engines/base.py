"""What every engine build takes and returns, and the checks on the ONNX file that come before any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from patchslim.choices import Precision

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""GPU architectures that TensorRT-RTX builds for on any machine."""

DEFAULT_TARGETS = TARGETS[1:]
"""All from sm80: Turing (sm75) has no fp32 and no bfloat16 matrix product in TensorRT-RTX."""

Batch = tuple[int, int, int]
"""Smallest, most usual and largest batch of the optimisation profile."""


@dataclass(frozen=True)
class BuildProgress:
    """One report from a running build: ``step`` of ``total`` steps of ``phase`` are done (``parent``: the phase around it)."""

    target: str
    phase: str
    parent: str | None
    step: int
    total: int


BuildProgressCallback = Callable[[BuildProgress], bool | None]
"""Called for each report; returning False cancels the build, which then raises KeyboardInterrupt."""


@dataclass(frozen=True)
class EngineResult:
    """What was built, by what and for what, and whether it ran here.

    ``fused_attentions`` is the smallest count over the targets, of ``attentions`` in the ONNX graph; None where the backend
    does not tell (ONNX Runtime). ``kernels``, ``fused`` and ``seconds`` map each target to its own numbers.
    """

    backend: Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
    version: str
    targets: list[str]
    precision: Precision
    batch: Batch
    files: list[Path]
    layers_file: Path | None
    attentions: int
    executed: bool
    reason: str = ""
    kernels: dict[str, int] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def fused_attentions(self) -> int | None:
        return min(self.fused.values()) if len(self.fused) == len(self.targets) else None

    @property
    def status(self) -> Literal["executed", "built, not executed"]:
        return "executed" if self.executed else "built, not executed"

    def summary(self) -> str:
        """One line for the terminal: backend, precision, targets, fused attentions, and whether the engine ran here."""
        parts = [f"{self.backend} {self.version}", self.precision, " ".join(self.targets)]
        if self.fused_attentions is not None:
            parts.append(f"{self.fused_attentions} of {self.attentions} attentions fused")
        elif self.backend != "onnxruntime":
            parts.append("fused attentions not known")
        parts.append(self.status + (f" ({self.reason})" if self.reason else ""))
        return ", ".join(parts)
