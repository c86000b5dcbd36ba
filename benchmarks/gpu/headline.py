"""``python -m benchmarks.gpu.headline``: the paper's headline on an NVIDIA GPU, in a few minutes and offline.

    python -m benchmarks.gpu.headline --data cifar10-test.tar --train-data cifar10-train.tar --minutes 8 --output headline.json
    python -m benchmarks.gpu.headline --tiny --output tiny.json    # on a CPU, in a minute: does it run?

ViT-Ti/16 at 224 px on CIFAR-10, all on the same held-out images, at each of ``--budgets``:

1. without training: the default plan, merging in every block, ToMe, and the same weights at a lower resolution;
2. distilled: ``--distilled-images`` unlabelled calibration images and the dense model's answers are all that it sees;
3. fine-tuned on all training images, the dense original as the teacher, and as controls the dense model and a lower resolution
   with the same recipe, teacher and epochs. They share the minutes that are left by then.

Rows are written as they are made, and the same command goes on from there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.gpu.headline_run import HeadlineOptions
from patchslim.cli import run_command


def measure_headline(options: HeadlineOptions) -> dict[str, Any]:
    """All rows, each written as it is made. Raises ``PatchslimError``."""
    from benchmarks.gpu.headline_run import Headline
    from benchmarks.gpu.trained_rows import distilled, fine_tuned
    from benchmarks.gpu.untrained_rows import training_free

    run = Headline(options)
    run.bench.check_unseen(run.draw.session.calibration)
    try:
        students = training_free(run)
    except RuntimeError as error:
        if run.device.type == "cpu":
            raise
        run.say(f"searching on the GPU failed, so on the CPU: {error!r}")
        run.search_on_cpu()
        students = training_free(run)
    run.draw.close()
    distilled(run, students)
    fine_tuned(run, students)
    result: dict[str, Any] = json.loads(run.options.output.read_text())
    return result


def main(options: HeadlineOptions) -> int:
    """Measure, and print a line per row."""
    result = measure_headline(options)
    dense = next(row["top1"] for row in result["rows"] if row["name"] == "dense")
    for row in result["rows"]:
        print(
            f"{row['name']:40} {row['reduction']:7.1%} {row['top1']:8.2%} {100 * (row['top1'] - dense):+6.2f} {row['kl']:.4f}"
        )
    return 0


if __name__ == "__main__":
    description = "The paper's headline on an NVIDIA GPU: training-free, distilled and fine-tuned, with controls."
    sys.exit(run_command(HeadlineOptions, main, prog="benchmarks.gpu.headline", description=description))
