"""``python -m benchmarks.gpu.headline``: the paper's headline on an NVIDIA GPU, in a few minutes and offline.

    python -m benchmarks.gpu.headline --data cifar10-test.tar --train-data cifar10-train.tar --minutes 8 --output headline.json
    python -m benchmarks.gpu.headline --tiny --output tiny.json    # on a CPU, in a minute: does it run?

ViT-Ti/16 at 224 px on CIFAR-10, all on the same held-out images, at each of ``--budgets``:

1. without training: the default plan, merging in a few blocks alone, ToMe, and the same weights at a lower resolution;
2. distilled: ``--distilled-images`` unlabelled calibration images and the dense model's answers are all that it sees;
3. fine-tuned on all training images, the dense original as the teacher, and as controls the dense model and a lower resolution
   with the same recipe, teacher and epochs. They share the minutes that are left by then.

Rows are written as they are made, and the same command goes on from there.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.rows import Case
from benchmarks.gpu.subject import GpuSubject
from patchslim.cli import run_command
from patchslim.errors import InputRejected, UsageError
from patchslim.records import atomic_path

if TYPE_CHECKING:
    from torch import Tensor, nn

    from benchmarks.accuracy.bench import Bench, CalibrationDraw
    from slimming.api import FoundPlan
    from slimming.fitting.recipe import Recipe

#: What is fine-tuned at the default budgets, in this order.
FINE_TUNED: tuple[str, ...] = ("dense", "slim-46.2%", "slim-60.0%", "slim-45.0%", "few-block-46.2%", "at-176px")
_TINY_MODEL = ("img_size=48", "patch_size=16", "embed_dim=48", "depth=6", "num_heads=3", "num_classes=10")


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
        if min(self.minutes, self.finetune_lr) <= 0:
            raise UsageError("--minutes and --finetune-lr must be above 0")
        if min(self.distill_steps, self.distill_batch, self.finetune_batch, self.distilled_images) < 1:
            raise UsageError("--distill-steps, --distill-batch, --distilled-images and --finetune-batch: at least 1")
        self.of_tables().check()

    def smallest(self) -> HeadlineOptions:
        """What ``--tiny`` stands for."""
        return dataclasses.replace(
            self,
            name="tiny",
            model="vit_tiny_patch16_224",
            model_arg=_TINY_MODEL,
            weights="random",
            eval_images=16,
            calibration_images=8,
            budgets=(0.4,),
            threads=1,
            minutes=0.2,
            distilled_images=16,
            distill_steps=2,
            distill_batch=4,
            finetune_batch=4,
            max_epochs=2.0,
            device="cpu",
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
            "distilled_images": options.distilled_images,
            "training_images": len(self.images),
            "searched_on": self.searched_on,
        }

    def found(self, budget: float, counts: Sequence[int] | None = None) -> FoundPlan:
        """The default plan at a budget, or one of given token counts, with its closed-form fit."""
        from slimming.session import search

        case = dataclasses.replace(self.bench.options.default_case(), budget=budget)
        if counts is None:
            return self.draw.found(case)
        options = self.bench.options.slimming(case)
        options = dataclasses.replace(options, macs_reduction=None, tokens=",".join(map(str, counts)))
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


def measure_headline(options: HeadlineOptions) -> dict[str, Any]:
    """All rows, each written as it is made. Raises ``PatchslimError``."""
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


#: What makes a model to train: a fresh copy with the weights it starts from, and how many of the MACs it saves.
Student = tuple[Callable[[], "nn.Module"], float]


def training_free(run: Headline) -> dict[str, Student]:
    """Measure the rows without training; what the trained rows start from, by name."""
    from slimming.models.slim_vit import SlimViT

    bench, dense = run.bench, run.bench.dense_macs
    students: dict[str, Student] = {"dense": (lambda: copy.deepcopy(bench.model), 0.0)}
    if "dense" not in run.rows:
        run.add("dense", bench.model, reduction=0.0, kind="original")
    for name, (found, seconds) in plans(run).items():
        reduction = round(1 - found.plan.macs() / dense, 5)

        def made(found: FoundPlan = found) -> nn.Module:
            module = copy.deepcopy(found.model).to(run.device)
            return SlimViT(module, found.plan).to(run.device)

        students[name] = (made, reduction)
        if name not in run.rows:
            facts: dict[str, Any] = {"counts": found.plan.counts, "search_s": round(seconds, 1)}
            run.add(name, made(), reduction=reduction, kind="training-free", **facts)
    for budget in run.options.budgets:
        for cut in (False, True):
            name = f"ToMe-{budget:.1%}" + ("-last-block-cut" if cut else "")
            if name not in run.rows:
                module, facts = bench.baseline(Case("ToMe", budget, head_only=cut))
                run.add(name, module, reduction=round(1 - facts.pop("macs") / dense, 5), kind="training-free", **facts)
    for side in lower_sides(run.size, run.options.tiny):
        name = f"at-{side}px"
        reduction = round(1 - macs_at(bench, side) / dense, 5)
        students[name] = (lambda side=side: at_resolution(bench.model, side), reduction)  # type: ignore[misc]
        if name not in run.rows:
            run.add(name, students[name][0](), reduction=reduction, kind="training-free")
    return students


def plans(run: Headline) -> dict[str, tuple[FoundPlan, float]]:
    """The default plan and the one of few merging blocks at every budget, with the seconds that each took."""
    from benchmarks.gpu.few_blocks import few_block_counts

    wanted: dict[str, tuple[float, Sequence[int] | None]] = {}
    for budget in run.options.budgets:
        few = few_block_counts(run.bench.model, run.options.model, budget)
        wanted |= {f"slim-{budget:.1%}": (budget, None), f"few-block-{budget:.1%}": (budget, few)}
    found: dict[str, tuple[FoundPlan, float]] = {}
    for name, (budget, counts) in wanted.items():
        start = time.monotonic()
        found[name] = (run.found(budget, counts), time.monotonic() - start)
        run.say(f"{name}: found in {found[name][1]:.1f} s, {run.elapsed():.0f} s gone")
    run.bench.model.to(run.device)
    return found


def distilled(run: Headline, students: dict[str, Student]) -> None:
    """Measure the default plans distilled from unlabelled calibration images."""
    from slimming.fitting.recipe import Recipe

    options = run.options
    recipe = Recipe(
        epochs=options.distill_steps * options.distill_batch / min(options.distilled_images, len(run.images)),
        batch_size=options.distill_batch,
        lr=3e-4,
        distill=1.0,
        label_smoothing=0.0,
        precision="bf16",
    )
    for name in [name for name in students if name.startswith("slim-")]:
        if f"{name}-distilled" not in run.rows:
            module = students[name][0]()
            facts = run.trained(module, recipe, labelled=False, images=min(options.distilled_images, len(run.images)))
            run.add(f"{name}-distilled", module, reduction=students[name][1], kind="distilled", **facts)


def fine_tuned(run: Headline, students: dict[str, Student]) -> None:
    """Measure the fine-tuned rows, all for the same epochs: what the minutes that are left allow, by a probe of each."""
    options = run.options
    names = order_of(students)
    missing = [name for name in names if f"{name}-finetuned" not in run.rows]
    if not missing:
        return
    known = [row["recipe"]["epochs"] for name, row in run.rows.items() if name.endswith("-finetuned")]
    epochs = known[0] if known else epochs_left(run, [students[name][0] for name in names])
    run.say(f"fine-tuning {', '.join(missing)} for {epochs:g} epochs each, {run.elapsed():.0f} s gone")
    for name in missing:
        module = students[name][0]()
        facts = run.trained(module, finetune_recipe(options, epochs), labelled=True)
        run.add(f"{name}-finetuned", module, reduction=students[name][1], kind="fine-tuned", **facts)
        if name in options.keep:
            keep_weights(module, options.output.with_name(f"{options.output.stem}-{name.replace('%', '')}.safetensors"))


def order_of(students: dict[str, Student]) -> list[str]:
    """The students to fine-tune, those first that the headline needs."""
    wanted = [name for name in FINE_TUNED if name in students]
    return wanted if len(wanted) > 1 else list(students)[:4]


def finetune_recipe(options: HeadlineOptions, epochs: float) -> Recipe:
    """The recipe that all fine-tuned rows share."""
    from slimming.fitting.recipe import Recipe

    return Recipe(epochs=epochs, batch_size=options.finetune_batch, lr=options.finetune_lr, precision="bf16")


def epochs_left(run: Headline, makers: Sequence[Callable[[], nn.Module]]) -> float:
    """How many epochs all of ``makers`` can have in what is left of the minutes, less a tenth for measuring them."""
    steps = 2 if run.options.tiny else 30
    share = steps * run.options.finetune_batch / len(run.images)
    seconds = 0.0
    for make in makers:
        for _ in range(2):  # the first call also loads kernels
            facts = run.trained(make(), finetune_recipe(run.options, share), labelled=True)
        seconds += float(facts["training"]["seconds"]) / share
    left = max(5.0, 60 * run.options.minutes - run.elapsed() - 6 * len(makers))
    return min(run.options.max_epochs, round(0.95 * left / seconds, 2))


def lower_sides(size: int, tiny: bool) -> list[int]:
    """Sides of images that save about 41, 52 and 61 % of ViT-Ti's MACs at 224 px."""
    return [32] if tiny else [side for side in (176, 160, 144) if side < size]


def at_resolution(model: Any, side: int) -> nn.Module:
    """The model behind a resize of its images to ``side`` pixels, its position embedding resampled as timm does it."""
    from torch import nn
    from torch.nn import functional

    class AtResolution(nn.Module):
        """A model at another resolution, for the same images."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.model = inner
            self.num_classes = inner.num_classes

        def forward(self, images: Tensor) -> Tensor:
            """Images (b, 3, h, w) -> logits (b, classes)."""
            result: Tensor = self.model(functional.interpolate(images, (side, side), mode="bicubic", antialias=True))
            return result

    inner = copy.deepcopy(model)
    inner.set_input_size(img_size=(side, side))
    return AtResolution(inner).to(next(model.parameters()).device)


def macs_at(bench: Bench, side: int) -> int:
    """Multiply-accumulates of the dense model on images of ``side`` pixels."""
    from patchslim.macs import macs_of
    from slimming.models.reader import reader_of

    inner = copy.deepcopy(bench.model)
    inner.set_input_size(img_size=(side, side))  # type: ignore[operator]
    reader = reader_of(inner, bench.options.model)
    return macs_of([reader.tokens] * len(reader.blocks), reader.tokens, reader.geometry())


def keep_weights(module: Any, path: Path) -> None:
    """Write the weights of a fine-tuned model in half precision."""
    from safetensors.torch import save_file

    network = getattr(module, "model", module)
    save_file({name: value.half().cpu().contiguous() for name, value in network.state_dict().items()}, path)


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
