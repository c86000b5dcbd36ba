"""The pictures that the golden inputs were made of, kept losslessly, so that others can check their own preprocessing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.source import ExportSource, ModelFacts
from export.stages import Workspace
from patchslim.arrays import Array
from patchslim.errors import InputRejected
from validate.golden_images import MAX_PIXELS, cost_of, difference
from validate.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pixels that the pictures of a bundle have together, at most: photographs of a camera would outweigh the model.
_MOST_PIXELS = 1 << 24


def preprocessing(model: ModelFacts) -> Preprocessing:
    """How images become the model's input: timm's names, and the rule that they stand for."""
    config = model.data_config
    return Preprocessing(
        input_size=tuple(config["input_size"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        mean=list(config["mean"]),
        std=list(config["std"]),
    ).with_rule()


def golden_images(source: ExportSource, inputs: Array, work: Workspace) -> dict[int, Path]:
    """PNG files of the first held-out images by their row in ``inputs`` (k, 3, h, w), as far as together they are small enough.

    Raises ``InputRejected`` where the rule does not make ``inputs`` of them: nobody else could prepare images for the model.
    """
    spec = preprocessing(source.model)
    folder = work.cache.path(
        "golden",
        images=source.evaluation_fingerprint,
        count=len(inputs),
        preprocessing=spec.model_dump(mode="json"),
    )

    def build(part: Path) -> list[str]:
        left_out = _save_pictures(source, inputs, spec, part)
        return [f"golden: {left_out} of {len(inputs)} pictures are too large to go along"] if left_out else []

    work.cache.make(folder, build)
    return {int(path.stem): path for path in sorted(folder.glob("*.png"))}


def _save_pictures(source: ExportSource, inputs: Array, spec: Preprocessing, folder: Path) -> int:
    """Save the pictures of ``inputs`` in order, as long as they fit, else the smallest one; returns how many are left out."""
    images, rule = source.evaluation_images, spec.rule
    assert rule is not None
    images.samples.transform = None
    saved, pixels, cost = 0, 0, 0
    smallest: tuple[int, Image, int] | None = None
    for row, index in enumerate(images.indices[: len(inputs)]):
        picture = images.samples[index][0].convert(rule.colours)
        own, own_cost = math.prod(picture.size), cost_of(picture.size, rule)
        if pixels + own <= _MOST_PIXELS and cost + own_cost <= MAX_PIXELS:
            _save(picture, row, source, inputs, spec, folder)
            saved, pixels, cost = saved + 1, pixels + own, cost + own_cost
        elif own_cost <= MAX_PIXELS and (smallest is None or own < smallest[2]):
            smallest = row, picture, own
    if not saved and smallest is not None:
        _save(smallest[1], smallest[0], source, inputs, spec, folder)
        saved = 1
    return len(inputs) - saved


def _save(picture: Image, row: int, source: ExportSource, inputs: Array, spec: Preprocessing, folder: Path) -> None:
    from validate.images import preprocess

    if fault := difference(preprocess(picture, spec), np.ascontiguousarray(inputs[row])):
        raise InputRejected(
            f"{source.evaluation.address}: {source.model.architecture} prepares its images in a way that the manifest has no "
            f"rule for: {fault}"
        )
    picture.save(folder / f"{row}.png", format="PNG")
