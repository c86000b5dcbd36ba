"""What finding a plan costs, in dense forward passes over the same images.

    python -m benchmarks.search_cost --images 64 128 256

Both run in this process, one after the other, at the batch of the search. Images are decoded beforehand and counted in neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any


class Decoded:
    """Tensors in place of images, so that decoding is not timed."""

    def __init__(self, tensors: Any) -> None:
        self.tensors = tensors
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.tensors[index], 0


def measure(model: str, images: int, rounds: int, reduction: float) -> dict[str, float | int]:
    """Medians over ``rounds`` of (search / dense pass) and (search and closed-form fit / dense pass)."""
    import dataclasses

    import torch
    from timm.data import create_transform

    from slimming import Budget, calibration_set, find, load_model
    from slimming.data import load_tensors

    loaded = load_model(model, weights="bundled" if model == "vit_ti" else "random")
    transform = create_transform(**loaded.data_config)
    calibration = calibration_set("digits", images)
    decoded = Decoded(torch.cat([batch for batch, _ in load_tensors(calibration, transform)]))
    ready = dataclasses.replace(calibration, samples=decoded, indices=list(range(images)))
    search, fitted, dense = [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        with torch.inference_mode():
            for batch, _ in load_tensors(ready, None):
                loaded.module(batch)
        dense.append(time.perf_counter() - start)
        for fit, times in (("none", search), ("closed-form", fitted)):
            start = time.perf_counter()
            find(loaded.module, ready, name=model, transform=None, budget=Budget("macs-reduction", reduction), fit=fit)
            times.append(time.perf_counter() - start)
    ratio = [found / one for found, one in zip(search, dense, strict=True)]
    whole = [found / one for found, one in zip(fitted, dense, strict=True)]
    return {
        "images": images,
        "dense_s": statistics.median(dense),
        "search_passes": statistics.median(ratio),
        "search_and_fit_passes": statistics.median(whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_ti", help="a preset or timm name (default: %(default)s)")
    parser.add_argument("--images", type=int, nargs="+", default=[128, 256], help="calibration images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="times that each is measured (default: %(default)s)")
    parser.add_argument("--macs-reduction", type=float, default=0.45)
    args = parser.parse_args()
    for images in args.images:
        print(json.dumps(measure(args.model, images, args.rounds, args.macs_reduction)), flush=True)


if __name__ == "__main__":
    main()
