"""One run of ``benchmarks.gpu.headline``: its options, what it measures on, and its rows, written as they are made."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from benchmarks.accuracy.rows import BLOCKS, Case
from benchmarks.gpu.subject import GpuSubject
from patchslim.errors import InputRejected, UsageError
from patchslim.records import atomic_path

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.accuracy.bench import Bench, CalibrationDraw
    from slimming.api import FoundPlan
    from slimming.fitting.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class HeadlineOptions(GpuSubject):
    """Options of ``benchmarks.gpu.headline``."""

    calibration_images: int = 1024
    """How many images a plan is made from."""
    budgets: tuple[float, ...] = (0.45, 0.462, 0.60)
    """Fractions of the dense multiply-accumulates that we remove."""
    minutes: float = 8.0
    """Minutes for all of it: fine-tuning has what is left."""
    distilled_images: int = 4096
    """Unlabelled images that a distilled model sees."""
    distill_steps: int = 800
    """Steps of distillation."""
    distill_batch: int = 128
    """Images per step of distillation."""
    distill_lr: float = 3e-4
    """Peak learning rate of distillation."""
    finetune_batch: int = 256
    """Images per step of fine-tuning."""
    finetune_lr: float = 3e-4
    """Peak learning rate of fine-tuning."""
    max_epochs: float = 20.0
    """Fine-tune no longer than this, however many minutes are left."""
    output: Path = Path("headline.json")
    """The JSON file of results; fine-tuned weights go beside it."""
    keep: tuple[str, ...] = ("slim-46.2%",)
    """Rows whose fine-tuned weights are kept, as OUTPUT-ROW.safetensors in half precision."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if min(self.minutes, self.distill_lr, self.finetune_lr) <= 0:
            raise UsageError("--minutes, --distill-lr and --finetune-lr must be above 0")
        if min(self.distill_steps, self.distill_batch, self.finetune_batch, self.distilled_images) < 1:
            raise UsageError("--distill-steps, --distill-batch, --distilled-images and --finetune-batch: at least 1")
        self.of_tables().check()

    def smallest(self) -> Self:
        """What ``--tiny`` stands for."""
        return dataclasses.replace(
            super().smallest(),
            minutes=0.2,
            distilled_images=16,
            distill_steps=2,
            distill_batch=4,
            finetune_batch=4,
            max_epochs=2.0,
            keep=("slim-40.0%",),
        )

    def command(self) -> str:
        """The command line that these options come from."""
        return self.command_of("benchmarks.gpu.headline", ("threads",))


class Headline:
    """One run: the held-out images, the dense model, the training images on its device, and the rows so far."""

    def __init__(self, options: HeadlineOptions) -> None:
        from benchmarks.accuracy.bench import Bench, CalibrationDraw
        from benchmarks.gpu.device import device_of, ensure_device
        from benchmarks.training.train_cifar10 import read_tar
        from slimming.session import training_images

        self.start = time.monotonic()
        self.command = options.command()
        self.options = options.smallest() if options.tiny else options
        self.options.check()
        ensure_device(self.options.device)
        self.bench: Bench = Bench(self.options.of_tables())
        self.say = self.bench.reporter.say
        self.draw: CalibrationDraw = CalibrationDraw(self.bench, self.bench.options.modes[0], 0)
        self.device = next(self.bench.model.parameters()).device
        self.images, self.targets = (tensor.to(self.device) for tensor in read_tar(Path(self.options.train_data)))
        tables = self.bench.options.slimming(Case("dense"))
        self.described = training_images(dataclasses.replace(tables, train_data=self.options.train_data))
        self.size = int(self.bench.session.loaded.data_config["input_size"][-1])
        self.device_facts = device_of(self.options.device)
        self.searched_on = self.device.type
        self.rows: dict[str, dict[str, Any]] = {}
        self.rows |= found_rows(self.options.output, self.device_facts["name"])
        self.say(f"ready after {self.elapsed():.0f} s")

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def search_on_cpu(self) -> None:
        """Search plans with the model on the CPU from here on."""
        from benchmarks.accuracy.bench import CalibrationDraw

        self.draw.close()
        self.bench.model.cpu()
        self.draw = CalibrationDraw(self.bench, self.bench.options.modes[0], 0)
        self.searched_on = "cpu"

    def add(self, name: str, module: nn.Module, **facts: Any) -> None:
        """Measure ``module`` and write its row."""
        found = self.bench.accuracy_of(module.eval(), name)
        self.rows[name] = {"name": name, **facts, **found, "at_s": round(self.elapsed(), 1)}
        self.write()
        dense = float((self.bench.dense.argmax(1) == self.bench.labels).double().mean())
        self.say(f"{name}: {found['top1']:.2%} ({100 * (found['top1'] - dense):+.2f}), KL {found['kl']:.4f}")

    def write(self) -> None:
        """Write all rows, whole or not at all."""
        result = {"name": self.options.name, "command": self.command, "device": self.device_facts}
        result |= {**self.bench.described(), "finetune": self.recipe_facts()}
        with atomic_path(self.options.output) as path:
            lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items()]
            rows = ",\n  ".join(json.dumps(row) for row in self.rows.values())
            path.write_text("{\n" + ",\n".join(lines) + f',\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")

    def recipe_facts(self) -> dict[str, Any]:
        """What the trained rows have in common."""
        options = self.options
        return {
            "finetune_batch": options.finetune_batch,
            "finetune_lr": options.finetune_lr,
            "distill_steps": options.distill_steps,
            "distill_batch": options.distill_batch,
            "distill_lr": options.distill_lr,
            "distilled_images": options.distilled_images,
            "training_images": len(self.images),
            "searched_on": self.searched_on,
        }

    def found(self, budget: float, merge_blocks: str | None = None) -> FoundPlan:
        """The default plan at a budget, or one that merges where ``merge_blocks`` says, with its closed-form fit."""
        from slimming.session import search

        case = dataclasses.replace(self.bench.options.default_case(), method=f"{BLOCKS}auto", budget=budget)
        if merge_blocks is None:
            return self.draw.found(case)
        options = self.bench.options.slimming(case)
        options = dataclasses.replace(options, merge_blocks=merge_blocks)
        with self.bench.reporter.stages() as progress:
            return search(options, self.draw.session, options.layout, progress, finder=self.draw.finder(options))

    def trained(self, module: nn.Module, recipe: Recipe, *, labelled: bool, images: int | None = None) -> dict[str, Any]:
        """Train ``module`` in place, the dense model its teacher; what its row says of it. ``images``: evenly spread few."""
        from benchmarks.gpu.images import ResidentImages
        from slimming.fitting.finetune import finetune

        total = len(self.images)
        places = [place * total // images for place in range(images)] if images else list(range(total))
        described = dataclasses.replace(self.described, indices=[self.described.indices[place] for place in places])
        resident = ResidentImages(
            self.images[places], self.targets[places], self.size, recipe.batch_size, recipe.seed, labelled
        )
        with self.bench.reporter.stages() as progress:
            report = finetune(
                module,
                copy.deepcopy(self.bench.model),
                described,
                data_config=self.bench.session.loaded.data_config,
                recipe=recipe,
                feed=resident,
                progress=progress,
            )
        return {"training": report.as_dict(), "recipe": dataclasses.asdict(recipe)}


def found_rows(path: Path, device: str) -> dict[str, dict[str, Any]]:
    """The rows that an earlier call wrote, by name; raises ``InputRejected`` where they are of another device."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        measured_on, rows = found["device"]["name"], {row["name"]: row for row in found["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputRejected(f"{path}: not a results file of benchmarks.gpu.headline: {error}") from error
    if measured_on != device:
        raise InputRejected(f"{path}: holds results of {measured_on}: take another --output")
    return rows
