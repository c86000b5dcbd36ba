"""An ONNX file as the model of a search: ``LoadedGraph``, and what its images and classes must be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from patchslim.choices import Layout
from patchslim.errors import InputRejected, UsageError
from patchslim.plan import SlimPlan
from slimming.data.source import ImageSet
from slimming.onnx_models.reader import GraphReader


@dataclass(frozen=True)
class LoadedGraph:
    """An ONNX file with all that is known of it: a ``LoadedVit``."""

    architecture: str
    reader: GraphReader
    data_config: dict[str, Any]
    weights: str

    def slimmed(self, model: nn.Module, plan: SlimPlan, layout: Layout) -> nn.Module:
        """Return the graph cut to ``plan``, in ONNX Runtime; ``model`` can only be the dense graph, which has no fit.

        Raises ``InputRejected`` where the graph cannot be cut.
        """
        return self.reader.slimmed(plan, layout)

    def described(self) -> str:
        """Return the preprocessing in words."""
        config = self.data_config
        _, height, width = config["input_size"]
        means, deviations = (", ".join(f"{value:g}" for value in config[key]) for key in ("mean", "std"))
        return (
            f"images of {height} x {width}, {config['interpolation']}, crop {config['crop_pct']:g}, mean {means}, "
            f"std {deviations} (ImageNet's where --interpolation, --crop-pct, --mean and --std say nothing)"
        )


def load_graph(path: Path, preprocessing: Mapping[str, Any], evaluated: ImageSet | None = None) -> LoadedGraph:
    """Read the graph at ``path``; ``evaluated`` is to be measured on, if anything is.

    ``preprocessing`` overrides ImageNet's data config (timm's names; None: nothing is said). Raises ``UsageError`` and
    ``InputRejected`` with the next step in the message.
    """
    from timm.data import resolve_data_config

    side = preprocessing.get("img_size")
    reader = GraphReader(path, side)
    height, width = reader.graph.image_shape
    if side is not None and (height, width) != (side, side):
        raise UsageError(f"--img-size {side}: {path} takes images of {height} x {width}: leave --img-size out")
    if evaluated is not None:
        _check_classes(path, reader, evaluated)
    # The part of timm that resizes and normalises; what is not said is ImageNet's.
    overrides = {key: value for key, value in preprocessing.items() if value is not None and key != "img_size"}
    config = resolve_data_config(args=overrides | {"input_size": (3, height, width)}, pretrained_cfg={})
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    return LoadedGraph(re.sub(r"[^A-Za-z0-9._-]", "_", path.stem), reader, config, path.name)


def _check_classes(path: Path, reader: GraphReader, evaluated: ImageSet) -> None:
    labels = evaluated.labels
    if len(labels) == 1:
        raise InputRejected(f"{evaluated.address}: has one class only, so every answer would be right")
    if labels and reader.classes is not None and len(labels) != reader.classes:
        found = f"{evaluated.address} has {len(labels)} classes, {path} gives {reader.classes} answers"
        raise InputRejected(f"{found}: pass data of its classes, or leave --eval-images and --sweep out")
