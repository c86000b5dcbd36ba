"""What an attack is, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from tests.helpers.attacks.vit import tiny_vit

Content = onnx.ModelProto | bytes | None


@dataclass(frozen=True)
class Attack:
    """``make`` fills a folder with what the model needs and returns the model, None where it wrote that itself.

    ``fault``: a regular expression that the message must contain. ``alone``: may crash, hang or fill the memory of the process.
    """

    name: str
    fault: str
    make: Callable[[Path], Content]
    alone: bool = False

    def write(self, folder: Path) -> Path:
        """Write the model and its files, and return the model's path."""
        path, content = folder / "model.onnx", self.make(folder)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
        return path


ATTACKS: list[Attack] = []


def attack(fault: str, *, alone: bool = False) -> Callable[[Callable[[Path], Content]], Callable[[Path], Content]]:
    """Register a function of a folder as an attack under its own name."""

    def register(make: Callable[[Path], Content]) -> Callable[[Path], Content]:
        ATTACKS.append(Attack(make.__name__, fault, make, alone))
        return make

    return register


def damage(fault: str, *, alone: bool = False) -> Callable[[Callable[[onnx.ModelProto], None]], None]:
    """Register a function that damages a sound Vision Transformer in place."""

    def register(change: Callable[[onnx.ModelProto], None]) -> None:
        def make(folder: Path) -> onnx.ModelProto:
            model = tiny_vit()
            change(model)
            return model

        ATTACKS.append(Attack(change.__name__, fault, make, alone))

    return register


def node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    """The node that computes ``output``."""
    return next(entry for entry in model.graph.node if output in entry.output)


def weight(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """The initializer of that name."""
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def put(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    """Give an initializer other values."""
    weight(model, name).CopyFrom(numpy_helper.from_array(values, name))
