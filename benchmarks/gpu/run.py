"""``python -m benchmarks.gpu.run``: accuracy, then speed, of a ViT on an NVIDIA GPU, within about 15 minutes and offline.

    python -m benchmarks.gpu.run --data cifar10-test.tar --train-data cifar10-train.tar --minutes 5 --output gpu.json
    python -m benchmarks.gpu.run --tiny --output tiny.json    # on a CPU, in a minute: does it run?

1. Top-1 of the dense model, of the default plan at each of ``--budgets``, and of each after fine-tuning with bf16 for an equal
   share of ``--minutes``: rows as those of ``benchmarks.accuracy.tables``, in OUTPUT-accuracy.json.
2. Slim against dense at the first budget: PyTorch in fp16 and bf16, then ONNX Runtime's CUDA provider and TensorRT or
   TensorRT-RTX where they are installed. What is not gets the reason in place of times.

Results are written as they are made, and the same command goes on from there. **Not executed on a GPU yet**: only the tiny run
on a CPU has been.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.accuracy.rows import DEFAULT, SubjectOptions, TableOptions
from patchslim.cli import run_command
from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.records import atomic_path

if TYPE_CHECKING:
    from benchmarks.accuracy.bench import Bench, CalibrationDraw

#: A model and data for ``--tiny``.
_TINY_MODEL = ("img_size=48", "patch_size=16", "embed_dim=48", "depth=3", "num_heads=3", "num_classes=10")


@dataclasses.dataclass(frozen=True)
class GpuOptions(SubjectOptions):
    """Options of ``benchmarks.gpu.run``."""

    name: str = "cifar10-vit_ti-gpu"
    """What the results are called."""
    model: str = "vit_tiny_patch16_224"
    """A preset or any timm model name."""
    weights: str = "benchmarks/accuracy/cifar10_vit_ti.safetensors"
    """bundled, pretrained, random or a weights file."""
    data: str = "cifar10-test.tar"
    """Held-out images: digits, a folder, FILE.tar, hfds/NAME or wds/PATH."""
    train_data: str = "cifar10-train.tar"
    """Images to make plans from and to fine-tune on."""
    eval_images: int | None = None
    """How many held-out images; None is all."""
    budgets: tuple[float, ...] = (0.45, 0.462)
    """Fractions of the dense multiply-accumulates that we remove."""
    threads: int = os.cpu_count() or 1
    """Threads of PyTorch on the CPU."""
    minutes: float = 4.0
    """Minutes of fine-tuning, shared out over --budgets; 0 skips it."""
    train_images: int = 50_000
    """How many images an epoch has."""
    finetune_batch_size: int = 256
    """Images per step of fine-tuning."""
    probe_steps: int = 40
    """Steps of fine-tuning, thrown away, that say how many epochs the minutes have."""
    batches: tuple[int, ...] = (1, 8, 32, 128)
    """Images per timed run."""
    rounds: int = 30
    """How often dense and slim are timed in turn."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where PyTorch runs."""
    output: Path = Path("gpu.json")
    """The JSON file of results; exported models and engines are kept in OUTPUT-work beside it."""
    tiny: bool = False
    """A random small model, the built-in digits and the CPU instead: a test of the command, no measurement."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if self.minutes < 0 or self.probe_steps < 1 or not self.batches or min(self.rounds, *self.batches) < 1:
            raise UsageError("--minutes must not be negative; --probe-steps, --rounds and --batches: at least 1")
        self.of_tables().check()

    def of_tables(self, epochs: float = 0.0) -> TableOptions:
        """The options of the accuracy tables, with so many epochs of fine-tuning."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(SubjectOptions)}
        return TableOptions(
            **(shared | {"calibration_data": self.calibration_data or self.train_data}),
            train_data=self.train_data,
            seeds=(0,),
            finetune_epochs=epochs,
            finetune_images=self.train_images,
            finetune_batch_size=self.finetune_batch_size,
            finetune_precision="bf16",
            batch_size=None if self.tiny else 256,
            device=self.device,
            output=self.beside("accuracy.json"),
        )

    def beside(self, name: str) -> Path:
        """A path beside the results, called after them."""
        return self.output.with_name(f"{self.output.stem}-{name}")

    def smallest(self) -> GpuOptions:
        """What ``--tiny`` stands for."""
        return dataclasses.replace(
            self,
            name="tiny",
            model_arg=_TINY_MODEL,
            weights="random",
            data=DEFAULT.data,
            train_data=DEFAULT.data,
            eval_images=16,
            calibration_images=8,
            budgets=(0.4,),
            threads=1,
            minutes=min(self.minutes, 0.01),
            train_images=8,
            finetune_batch_size=4,
            probe_steps=1,
            batches=(1, 2),
            rounds=2,
            device="cpu",
        )

    def command(self) -> str:
        """The command line that these options come from."""
        return self.command_of("benchmarks.gpu.run", ("threads",))


def measure_on_gpu(options: GpuOptions) -> dict[str, Any]:
    """Accuracy, then speed, each written to ``--output`` as it is done. Raises ``PatchslimError``."""
    import torch

    from benchmarks.accuracy.bench import Bench, CalibrationDraw
    from benchmarks.gpu import speed

    command = options.command()
    options = options.smallest() if options.tiny else options
    options.check()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("PyTorch sees no CUDA device here; --tiny runs on a CPU")
    results = {"command": command, "device": device_of(options)} | found_results(options)
    bench = Bench(options.of_tables())
    draw = CalibrationDraw(bench, bench.options.modes[0], 0)

    def add(part: str, value: object) -> None:
        results[part] = value
        with atomic_path(options.output) as path:
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    measure_accuracy(options, bench, draw, results.get("finetune_epochs"), add)
    case = dataclasses.replace(bench.options.default_case(), budget=options.budgets[0])
    found = draw.found(case)
    subject = speed.Subject(bench, found, draw.module_of(found), bench.options.slimming(case), options.beside("work"))
    for part, measure in speed.MEASUREMENTS.items():
        if part not in results:
            bench.reporter.say(f"speed: {part}")
            add(part, measure(subject, options.batches, options.rounds))
    draw.close()
    return results


def measure_accuracy(options: GpuOptions, bench: Bench, draw: CalibrationDraw, epochs: float | None, add: Any) -> None:
    """Top-1 of the dense model, of the default plans, and of these fine-tuned for ``--minutes``; ``add`` keeps the results."""
    from benchmarks.accuracy.rows import Case
    from benchmarks.accuracy.tables import measure_cases

    plans = [dataclasses.replace(bench.options.default_case(), budget=budget) for budget in options.budgets]
    cases = [Case("dense"), *plans]
    result = measure_cases(bench, cases, options.command(), draw)
    if options.minutes:
        if epochs is None:
            epochs = epochs_within(options, bench, draw)
            add("finetune_epochs", epochs)
        bench.options = dataclasses.replace(bench.options, finetune_epochs=epochs)
        record = bench.options.finetune_record()
        cases += [dataclasses.replace(plan, finetune=record) for plan in plans]
        result = measure_cases(bench, cases, options.command(), draw)
    fields = ("method", "fit", "budget", "finetune", "reduction", "top1", "agreement", "kl", "finetuned", "refused")
    add("accuracy", [{name: row[name] for name in fields if name in row} for row in result["rows"]])


def epochs_within(options: GpuOptions, bench: Bench, draw: CalibrationDraw) -> float:
    """How many epochs each budget's share of ``--minutes`` has, by the rate of a short fine-tune that is thrown away.

    Its start is in the rate, so that the minutes are rather kept than used up.
    """
    given = bench.options
    probe = options.probe_steps * options.finetune_batch_size / options.train_images
    bench.options = dataclasses.replace(given, finetune_epochs=probe)
    try:
        case = dataclasses.replace(bench.options.default_case(), budget=options.budgets[0])
        finetuned = draw.found(case).finetune
    finally:
        bench.options = given
    assert finetuned is not None
    rate = float(finetuned["images"]) / float(finetuned["seconds"])
    return round(60 * options.minutes / len(options.budgets) * rate / options.train_images, 3)


def found_results(options: GpuOptions) -> dict[str, Any]:
    """What an earlier call of the same command wrote; raises ``InputRejected`` where it was another, or on another device."""
    if not options.output.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(options.output.read_text(encoding="utf-8"))
        same = found["device"]["name"] == device_of(options)["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputRejected(f"{options.output}: not a results file of benchmarks.gpu.run: {error}") from error
    if not same:
        raise InputRejected(f"{options.output}: holds results of {found['device']['name']}: take another --output")
    return found


def device_of(options: GpuOptions) -> dict[str, Any]:
    """What the results were measured on."""
    import timm
    import torch

    from patchslim.timing import processor_name

    found: dict[str, Any] = {"name": processor_name(), "kind": options.device, "cpu": processor_name()}
    if options.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found |= {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}
    return found | {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}


def main(options: GpuOptions) -> int:
    """Measure, and print the results as JSON."""
    print(json.dumps(measure_on_gpu(options), indent=1))
    return 0


if __name__ == "__main__":
    description = "Accuracy and speed on an NVIDIA GPU, in the minutes that a borrowed one has."
    sys.exit(run_command(GpuOptions, main, prog="benchmarks.gpu.run", description=description))
