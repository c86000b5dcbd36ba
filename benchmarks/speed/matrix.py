"""``python -m benchmarks.speed.matrix``: every way to run a ViT on this CPU, side by side, as multiples of the plain export.

All models of a size are timed in one run, a process each, in turn and in a new order each round; every speed is a median of
ratios of one round's times. Top-1 is of the same files in the same backends. What a machine can do at most is its rate of
square matrix products, timed in the same rounds.

    python -m benchmarks.speed.matrix --data cifar10-test.tar --calibration-data cifar10-train.tar --output matrix.json
    python -m benchmarks.speed.matrix --show benchmarks/speed/matrix.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from benchmarks.accuracy.rows import BLOCKS, Case, SubjectOptions, TableOptions
from benchmarks.speed.contender import Contender, ContenderProcess
from benchmarks.speed.contenders import OPENVINO, ContenderMaker, SpeedSubject
from benchmarks.speed.matrix_report import draw, markdown, read, write
from export.quantization import CALIBRATION_IMAGES
from patchslim.arrays import Array
from patchslim.cli import run_command
from patchslim.errors import UsageError
from patchslim.progress import Reporter
from patchslim.records import atomic_path
from patchslim.timing import interleaved, processor_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: A model for ``--tiny``, as arguments of ``timm.create_model``.
_TINY = ("img_size=48", "patch_size=16", "embed_dim=48", "depth=4", "num_heads=3", "num_classes=10")


@dataclasses.dataclass(frozen=True)
class MatrixOptions(SubjectOptions):
    """Options of ``benchmarks.speed.matrix``."""

    name: str = "cifar10-vit_ti"
    """What the results are called."""
    model: str = "vit_tiny_patch16_224"
    """A preset or any timm model name."""
    weights: str = "benchmarks/accuracy/cifar10_vit_ti.safetensors"
    """bundled, pretrained, random or a weights file."""
    eval_images: int | None = 992
    """How many held-out images top-1 is measured on; of the last ones as many as fill no batch are left out."""
    calibration_images: int = 1024
    """How many images a plan is made from."""
    budgets: tuple[float, ...] = (0.45, 0.60)
    """Fractions of the dense multiply-accumulates that we remove."""
    threads: int = os.cpu_count() or 1
    """Threads of everything that is timed."""
    sizes: tuple[str, ...] = ("vit_small_patch16_224",)
    """More timm models, with random weights: speed alone, by plans of evenly spread tokens, merged as the default does."""
    trained: bool = True
    """Time --model with its weights; without it --sizes alone."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Images per run."""
    rounds: int = 15
    """How often each is timed."""
    compiled: bool = True
    """Time torch.compile as well, which takes minutes to compile."""
    work: Path | None = None
    """A folder that keeps what was made, and top-1, for a second call."""
    prepare: bool = False
    """Make everything in --work and measure top-1, and time nothing: for a machine that is busy."""
    output: Path = Path("matrix.json")
    """The JSON file of results."""
    show: tuple[Path, ...] = ()
    """Instead of measuring: print these results as Markdown."""
    figure: Path | None = None
    """Draw the results, or the first of those shown, here: SVG or PNG."""
    tiny: bool = False
    """A random small model and few images instead: a test of the command, no measurement."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if not self.budgets or not all(0 < value < 1 for value in self.budgets):
            raise UsageError("--budgets: fractions between 0 and 1, at least one")
        if not self.batches or min(self.batches) < 1 or min(self.rounds, self.threads, self.eval_images or 1) < 1:
            raise UsageError("--batches, --rounds, --threads and --eval-images: at least 1")
        if not (self.trained or self.sizes):
            raise UsageError("--no-trained leaves nothing to time without --sizes")
        if self.prepare and self.work is None:
            raise UsageError("--prepare needs --work, a folder for what it makes")

    def command(self) -> str:
        """The command line that these options come from."""
        return self.command_of("benchmarks.speed.matrix", ("figure", "work", "prepare"))


def measure_matrix(options: MatrixOptions) -> dict[str, Any]:
    """Make, measure and time everything, and write the results after each model. Raises ``PatchslimError``."""
    options.check()
    command = options.command()
    if options.tiny:
        options = dataclasses.replace(
            options,
            model_arg=_TINY,
            weights="random",
            eval_images=8,
            calibration_images=8,
            budgets=(0.4,),
            batches=(1, 2),
            rounds=2,
            sizes=(),
            threads=1,
        )
    result: dict[str, Any] = {"name": options.name, "command": command, "machine": machine(options), "models": []}
    with contextlib.ExitStack() as stack:
        place = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="patchslim-matrix-")))
        reporter = Reporter()
        subjects = [partial(random_subject, options, name) for name in options.sizes]
        if options.trained:
            subjects.insert(0, partial(trained_subject, options))
        for number, make in enumerate(subjects):
            folder = place / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            subject = kept_subject(folder / "subject.pt", make)
            reporter.say(f"{subject.name}: making what is timed")
            maker = ContenderMaker(subject, folder, batches=options.batches, threads=options.threads)
            with reporter.alive():
                contenders = list(maker.all(compiled=options.compiled))
            with Race(contenders, options, reporter) as race:
                if subject.labels is not None:
                    race.add_top1(subject.labels, folder / "top1.json")
                for batch in options.batches:
                    race.run_once(batch)
                    if not options.prepare:
                        race.add_speeds(batch)
                facts = {"model": subject.name, "dense_macs": maker.dense_macs, "gemm_gflops": race.gemm}
            result["models"].append(facts | {"rows": race.rows})
            if not options.prepare:
                write(options.output, result)
    return result


def kept_subject(path: Path, make: Callable[[], SpeedSubject]) -> SpeedSubject:
    """What ``make`` gives, kept in ``path``, a file of this benchmark's own."""
    import torch

    if not path.exists():
        with atomic_path(path) as part:
            torch.save(make(), part)
    subject: SpeedSubject = torch.load(path, weights_only=False)
    return subject


def trained_subject(options: MatrixOptions) -> SpeedSubject:
    """The model with its weights, and the plans that ``slimming.run`` makes of it."""
    from benchmarks.accuracy.bench import Bench, CalibrationDraw

    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(SubjectOptions)}
    bench = Bench(TableOptions(**shared, seeds=(0,), output=options.output.with_suffix(".tables")))
    draw, slims = CalibrationDraw(bench, "compact", 0), {}
    for budget in options.budgets:
        found = draw.found(Case(f"{BLOCKS}auto", budget, "closed-form", "compact", 0))
        slims[budget] = (found.plan, found.model)
    draw.close()
    few = list(itertools.islice(bench.preprocessed(draw.session.calibration), CALIBRATION_IMAGES))
    calibration = np.stack([image.numpy() for image in few])
    labels = None if options.weights == "random" else bench.labels.numpy()
    return SpeedSubject(bench.session.loaded.architecture, bench.model, slims, bench.pixels.numpy(), calibration, labels)


def random_subject(options: MatrixOptions, name: str) -> SpeedSubject:
    """A model of random weights: no accuracy, but the same work."""
    import timm
    import torch

    from benchmarks.gpu.few_blocks import few_block_counts
    from benchmarks.gpu.sizes import plan_of_counts

    torch.manual_seed(0)
    model: Any = timm.create_model(name).eval()
    slims = {}
    for budget in options.budgets:
        slims[budget] = (plan_of_counts(model, name, few_block_counts(model, name, budget), merges=True), model)
    height, width = model.patch_embed.img_size
    images = np.random.default_rng(0).standard_normal((max(options.batches), 3, height, width), dtype=np.float32)
    return SpeedSubject(name, model, slims, images, images[:16], None)


class Race:
    """Contenders, a process each, and what is found of them; one that fails says how in its row, and stops nothing.

    Use it in a ``with`` block.
    """

    def __init__(self, contenders: Sequence[Contender], options: MatrixOptions, reporter: Reporter) -> None:
        limits = [
            Contender(f"GEMM {kind}", "limit", "gemm", threads=options.threads, multiplies=kind, precision=OPENVINO[kind])
            for kind in ("fp32", "bf16")
        ]
        self.options, self.reporter = options, reporter
        self._stack = contextlib.ExitStack()
        self.processes = [self._stack.enter_context(ContenderProcess(one)) for one in (*contenders, *limits)]
        self.rows: list[dict[str, Any]] = [
            {"name": one.name, "group": one.group, "multiplies": one.multiplies, "macs": one.macs, "speed": {}}
            for one in contenders
        ]
        self.works = set(range(len(self.processes)))
        self.gemm: dict[str, float] = {}

    def add_top1(self, labels: Array, known: Path) -> None:
        """Measure the top-1 of each in its own backend, in batches of the largest size; what ``known`` has is not measured."""
        found: dict[str, dict[str, float]] = json.loads(known.read_text()) if known.exists() else {}
        with self.reporter.bar("top-1", unit="models") as update:
            for index, row in enumerate(self.rows):
                with self._failing(index):
                    if row["name"] not in found:
                        answers = np.array(self.processes[index].answers(max(self.options.batches)))
                        right = float((answers == labels[: len(answers)]).mean())
                        found[row["name"]] = {"top1": right, "images": len(answers)}
                        known.write_text(json.dumps(found))
                    row |= found[row["name"]]
                update(index + 1, len(self.rows))

    def run_once(self, batch: int) -> None:
        """Find out what runs; what compiles does it now, and keeps what it made for a second call."""
        for index in sorted(self.works):
            with self._failing(index):
                self.processes[index].seconds(batch)

    def add_speeds(self, batch: int) -> None:
        """Time in turn all that works."""
        order = sorted(self.works)
        with self.reporter.bar(f"batch {batch}", unit="rounds") as update:
            runs = [partial(self.processes[index].seconds, batch) for index in order]
            times = np.array(interleaved(runs, self.options.rounds, warmup=1, progress=update), dtype=np.float64)
        columns = {index: times[:, at] for at, index in enumerate(order)}
        per_mac = {self.processes[index].contender.multiplies: own for index, own in columns.items() if index >= len(self.rows)}
        for index, row in enumerate(self.rows):
            if index not in columns:
                continue
            row["speed"][str(batch)] = speed_of(columns[index], columns[0], batch)
            if row["multiplies"] in per_mac:
                shares = per_mac[row["multiplies"]] * row["macs"] * batch / columns[index]
                row["speed"][str(batch)]["gemm_share"] = round(float(np.median(shares)), 4)
        self.gemm = {kind: round(2e-9 / float(np.median(own)), 1) for kind, own in per_mac.items()}

    @contextlib.contextmanager
    def _failing(self, index: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.works.discard(index)
            self.reporter.say(str(error))
            if index < len(self.rows):
                self.rows[index]["fault"] = str(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()


def speed_of(times: NDArray[np.float64], plain: NDArray[np.float64], batch: int) -> dict[str, float]:
    """Milliseconds a run, images a second, and the speed-up against ``plain`` with its quartiles, over the rounds."""
    low, middle, high = np.percentile(plain / times, [25, 50, 75])
    typical = float(np.median(times))
    return {
        "ms": round(1e3 * typical, 3),
        "images_per_s": round(batch / typical, 2),
        "speedup": round(float(middle), 3),
        "speedup_p25": round(float(low), 3),
        "speedup_p75": round(float(high), 3),
    }


def machine(options: MatrixOptions) -> dict[str, Any]:
    """What the results were measured with."""
    import onnxruntime
    import timm
    import torch

    from patchslim.openvino_runner import openvino_version

    found: dict[str, Any] = {"cpu": processor_name(), "threads": options.threads, "rounds": options.rounds}
    return found | {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino_version(),
    }


def main(options: MatrixOptions) -> int:
    """Measure, or show what was measured; the results as Markdown on stdout."""
    results = [read(path) for path in options.show] or [measure_matrix(options)]
    if options.prepare:
        return 0
    print("\n".join(markdown(result) for result in results))
    if options.figure:
        draw(results[0], options.figure)
    return 0


if __name__ == "__main__":
    description = "Every way to run a ViT on this CPU, side by side, as multiples of the plain export in ONNX Runtime."
    sys.exit(run_command(MatrixOptions, main, prog="benchmarks.speed.matrix", description=description))
