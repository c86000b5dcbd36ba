"""What a latency table is measured for: how blocks are laid, and what they run on."""

from __future__ import annotations

from dataclasses import dataclass

from export.engines.base import ENGINES
from patchslim.choices import EngineName, Layout, Mode, Precision
from patchslim.errors import UsageError


@dataclass(frozen=True)
class TimingConditions:
    """How the blocks of a plan are laid, and how they run: ``batch`` images at once, ``threads`` None for the engine's choice.

    ``merged`` says that blocks merge the tokens that they drop.
    """

    layout: Layout
    mode: Mode
    merged: bool = False
    engine: EngineName = "ort"
    precision: Precision = "fp32"
    batch: int = 8
    threads: int | None = None

    @property
    def graph(self) -> Precision:
        """The precision of the ONNX file that the engine is built from."""
        return ENGINES[self.engine].graph(self.precision)

    def check(self) -> None:
        """Raise ``UsageError`` for an impossible batch or number of threads."""
        for name, value in {"batch": self.batch, "threads": 1 if self.threads is None else self.threads}.items():
            if value < 1:
                raise UsageError(f"a latency table needs at least 1 for {name}, not {value}")
