"""What the stages of an export are called, in ``parity.json`` and on the terminal, and their files in a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from export.engines.base import ENGINES, QUANTISED
from patchslim.choices import EngineName, Precision

PYTORCH, PYTORCH_SLIM, ONNX_SLIM, ENGINE = "pytorch", "pytorch-slim", "onnx-slim", "engine"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")


@dataclass(frozen=True)
class StageNames:
    """The names of one engine's stages: of its run, ``engine``, and of its graph in float32, ``slim``.

    ``quantised`` is part of the name of a quantised graph that is not that of an engine before it.
    """

    engine: str = ENGINE
    slim: str = ONNX_SLIM
    quantised: str = ""

    @classmethod
    def beside(cls, engine: EngineName, first: EngineName) -> StageNames:
        """Those of a further engine of a bundle; a graph that the ``first`` is built from as well has one name."""
        layout = ENGINES[engine].layout
        return cls(f"{ENGINE}-{engine}", ONNX_SLIM if layout == ENGINES[first].layout else f"{ONNX_SLIM}-{layout}")

    def onnx(self, precision: Precision) -> str:
        """The graph in ``precision``."""
        own = f"-{self.quantised}" if precision in QUANTISED and self.quantised else ""
        return self.slim if precision == "fp32" else f"{self.slim}{own}-{precision}"

    @property
    def graphs(self) -> list[str]:
        """The graphs in every precision, float32 first."""
        return [self.onnx(precision) for precision in PRECISIONS]


ALONE = StageNames()
"""Those of a bundle's only engine, and of the first of several."""


def onnx_file(stage: str) -> str:
    """The file of an ONNX stage in a bundle: ``model.packed.fp16.onnx`` of ``onnx-slim-packed-fp16``."""
    return f"model{stage.removeprefix(ONNX_SLIM).replace('-', '.')}.onnx"
