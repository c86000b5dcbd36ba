"""What finding a plan costs, in dense forward passes over the same images.

    python -m benchmarks.search_cost --images 64 128 256

Both run in this process on one thread, dense passes before and after each search, at the batch of the search. Images are
decoded beforehand and counted in neither. CPU time counts, which stands still while others have the core; wall time is told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from patchslim.choices import Fit

if TYPE_CHECKING:
    from torch import Tensor

CLOCKS = ("cpu", "wall")
Times = tuple[float, float]
#: What is timed, by its name in the results.
FITS: dict[Fit, str] = {"none": "search", "closed-form": "search_and_fit"}


class Decoded:
    """Tensors in place of images, so that decoding is not timed."""

    def __init__(self, tensors: Tensor) -> None:
        self.tensors = tensors
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tensors[index], 0


def taken(work: Callable[[], object]) -> Times:
    """Seconds that ``work`` takes: of CPU, and of the wall clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure_search(
    model: str, images: int, rounds: int, reduction: float, merge_blocks: str | None = None
) -> dict[str, float | int]:
    """Medians over ``rounds`` of the time of a search, and of one with its closed-form fit, over that of a dense pass."""
    import dataclasses

    import torch
    from timm.data import create_transform

    from slimming import Budget, PlanRequest, calibration_set, find_plan, load_model
    from slimming.data.source import load_tensors
    from slimming.search.few_blocks import parse_merge_blocks

    torch.set_num_threads(1)
    where = None if merge_blocks is None else parse_merge_blocks(merge_blocks)
    loaded = load_model(model, weights="bundled" if model == "vit_ti" else "random")
    transform = create_transform(**loaded.data_config)
    calibration = calibration_set("digits", images)
    decoded = Decoded(torch.cat([batch for batch, _ in load_tensors(calibration, transform)]))
    ready = dataclasses.replace(calibration, samples=decoded, indices=list(range(images)))

    @torch.inference_mode()
    def dense() -> None:
        for batch, _ in load_tensors(ready, None):
            loaded.module(batch)

    def search(fit: Fit) -> None:
        find_plan(
            loaded.module,
            ready,
            name=model,
            transform=None,
            request=PlanRequest(Budget("macs-reduction", reduction), fit=fit, merge_blocks=where),
        )

    dense()  # the first pass is slow
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        passes = [taken(dense)]
        for fit, name in FITS.items():
            whole = taken(lambda fit=fit: search(fit))  # type: ignore[misc]
            passes.append(taken(dense))
            for clock, seconds, before, after in zip(CLOCKS, whole, *passes[-2:], strict=True):
                found.setdefault(f"{name}_{clock}_passes", []).append(2 * seconds / (before + after))
        for clock, each in zip(CLOCKS, zip(*passes, strict=True), strict=True):
            found.setdefault(f"dense_{clock}_s", []).extend(each)
    return {"images": images, **{name: round(statistics.median(values), 3) for name, values in found.items()}}


def main() -> int:
    """The command line's entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_ti", help="a preset or timm name (default: %(default)s)")
    parser.add_argument("--images", type=int, nargs="+", default=[128, 256], help="calibration images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="times that each is measured (default: %(default)s)")
    parser.add_argument("--macs-reduction", type=float, default=0.45)
    parser.add_argument("--merge-blocks", help="as of slimming.run")
    args = parser.parse_args()
    for images in args.images:
        print(json.dumps(measure_search(args.model, images, args.rounds, args.macs_reduction, args.merge_blocks)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
