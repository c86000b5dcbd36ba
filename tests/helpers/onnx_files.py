"""ONNX files of the tests' models, and pictures to calibrate on, made once for the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from tests.helpers.corpus import by_name, exported
from tests.helpers.made_once import made_once
from tests.helpers.onnx_models import dense


def picture_folder() -> Path:
    """Ten classes of random pictures of 32 x 32, two of each for calibration and two for evaluation."""
    return made_once("pictures", _write_pictures)


def _write_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{number}.png")


def graph_file(name: str) -> Path:
    """The ONNX file of a tiny timm model (``plain``) or of a case of the corpus (``hf_vit-dynamo20``); do not change it."""

    def write(path: Path) -> None:
        onnx.save(exported(by_name(name)) if "-" in name else dense(name)[1], path)

    return made_once(f"file-{name.replace(':', '_')}.onnx", write)
