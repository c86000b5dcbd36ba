"""``python -m benchmarks.accuracy.tables``: accuracy at equal cost, ours score by score against ToMe and EViT.

Every row is one way to spend the multiply-accumulates that a budget leaves, measured on the same held-out images. Rows are
written as they are done, and a second call of the same command goes on from there. Calibration and training images are
refused where they may be, or are, among the held-out ones. On a CPU, the same command gives the same rows.

    python -m benchmarks.accuracy.tables --name digits --output benchmarks/accuracy/results/digits.json
    python -m benchmarks.accuracy.tables --show benchmarks/accuracy/results/*.json
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import hashlib
import itertools
import json
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from slimming.door import BudgetUnreachable, InputRejected, Unavailable, UsageError, atomic_path, open_door
from slimming.plan import Fit, Mode, ScoreName

SCORES: tuple[ScoreName, ...] = ("similarity", "paper", "residual", "attention", "random", "uniform")
FITS: tuple[Fit, ...] = ("none", "closed-form")
#: EViT's ways with the tokens that it does not keep; the paper's text leaves room for all of them.
EVIT_FORMS: dict[str, dict[str, bool]] = {"summed": {}, "averaged": {"normalised": True}, "dropped": {"fuse": False}}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``benchmarks.accuracy.tables``."""

    name: str = "digits"
    """What the table is called."""
    model: str = "vit_ti"
    """A preset or any timm model name."""
    model_arg: tuple[str, ...] = ()
    """key=value pairs for timm.create_model."""
    weights: str = "bundled"
    """bundled, pretrained, random or a weights file."""
    data: str = "digits"
    """Held-out images: digits, a folder, FILE.tar, hfds/NAME or wds/PATH."""
    calibration_data: str | None = None
    """Images that plans and fits are made from; by default the part of --data that is not held out."""
    train_data: str | None = None
    """Images to fine-tune on; by default those of --calibration-data."""
    eval_images: int | None = 2000
    """How many held-out images; None is all."""
    calibration_images: int = 256
    """How many images a plan is made from."""
    budgets: tuple[float, ...] = (0.30, 0.45, 0.60)
    """Fractions of the dense multiply-accumulates to remove."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws its own calibration images, and its own random score."""
    scores: tuple[ScoreName, ...] = SCORES
    """The scores that plans are made by."""
    modes: tuple[Mode, ...] = ("compact",)
    """What later blocks see of a dropped token."""
    default_score: ScoreName = "similarity"
    """The score that is marked as ours."""
    default_fit: Fit = "closed-form"
    """The fit that is marked as ours."""
    finetune_epochs: float = 0
    """Epochs of fine-tuning of our default, for the first seed; 0 skips it."""
    finetune_images: int = 10_000
    """How many images an epoch has."""
    finetune_batch_size: int = 64
    """Images per step of fine-tuning."""
    finetune_lr: float | None = None
    """Peak learning rate of fine-tuning; None is slimming.run's default for the batch."""
    finetune_precision: Literal["no", "bf16"] = "no"
    """Mixed precision of fine-tuning."""
    finetune_reductions: tuple[float, ...] = (0.462,)
    """Budgets that fine-tuning is measured at, besides --budgets."""
    batch_size: int | None = None
    """Images at once; by default 100, and 16 where an image has more than 100 tokens."""
    threads: int = 1
    """Threads of PyTorch on the CPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where PyTorch runs."""
    output: Path = Path("tables.json")
    """The JSON file of results; what it holds already is not measured again."""
    show: tuple[Path, ...] = ()
    """Instead of measuring: print these results as Markdown."""
    figure: Path | None = None
    """Draw the results, or the first of those shown, here: SVG or PNG."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if not self.budgets or not all(0 <= value < 1 for value in (*self.budgets, *self.finetune_reductions)):
            raise UsageError("--budgets and --finetune-reductions are fractions from 0 to below 1")
        if not self.seeds or min(self.seeds) < 0 or not self.modes:
            raise UsageError("--seeds and --modes need at least one value, and seeds are not negative")
        if min(self.calibration_images, self.finetune_images, self.threads, self.batch_size or 1, self.eval_images or 1) < 1:
            raise UsageError("--eval-images, --calibration-images, --finetune-images, --batch-size, --threads: at least 1")
        if self.default_fit not in FITS:
            raise UsageError(f"--default-fit {self.default_fit}: the tables have {' and '.join(FITS)}")
        if self.finetune_epochs < 0:
            raise UsageError("--finetune-epochs must not be negative")

    def calibration_address(self) -> str:
        """Where plans and fits are made from."""
        return self.calibration_data or self.data

    def train_address(self) -> str:
        """What is fine-tuned on."""
        return self.train_data or self.calibration_address()

    def command(self) -> str:
        """The command line that these options come from; of a path outside this folder only the name is told."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name != "figure":
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{field.name.replace('_', '-')}", *(public(str(each)) for each in values)]
        return shlex.join(["python", "-m", "benchmarks.accuracy.tables", *words])


@dataclasses.dataclass(frozen=True)
class Case:
    """One row to measure; ``budget`` is the fraction of the dense multiply-accumulates to remove."""

    method: str  # dense, a score, ToMe or EViT
    budget: float = 0.0
    fit: str | None = None
    mode: Mode | None = None
    seed: int | None = None
    head_only: bool | None = None  # of a rival: whether its last block is cut to the class token, as ours is
    form: str | None = None  # of EViT
    finetune: dict[str, Any] | None = None

    def title(self) -> str:
        """What a log line calls it."""
        parts = [self.method, self.fit, self.mode, self.form, "last block cut" if self.head_only else None]
        parts += ["fine-tuned"] if self.finetune else []
        return ", ".join([*(part for part in parts if part), f"-{self.budget:.1%}"]) + (
            "" if self.seed is None else f", seed {self.seed}"
        )


def cases(options: Options) -> list[Case]:
    """Every row that the options ask for, in the order in which they are measured."""
    rows = [Case("dense")]
    for budget, cut in itertools.product(options.budgets, (False, True)):
        rows.append(Case("ToMe", budget, head_only=cut))
        rows += [Case("EViT", budget, head_only=cut, form=form) for form in EVIT_FORMS]
    ours = itertools.product(options.modes, options.seeds, options.budgets, options.scores, FITS)
    rows += [Case(score, budget, fit, mode, seed) for mode, seed, budget, score, fit in ours]
    if options.finetune_epochs:
        recipe = {"epochs": options.finetune_epochs, "images": options.finetune_images, "data": public(options.train_address())}
        recipe |= {"batch_size": options.finetune_batch_size, "lr": options.finetune_lr}
        recipe |= {} if options.finetune_precision == "no" else {"precision": options.finetune_precision}
        for budget in sorted({*options.finetune_reductions, *options.budgets}):
            rows.append(
                Case(options.default_score, budget, options.default_fit, options.modes[0], options.seeds[0], finetune=recipe)
            )
    return rows


def public(word: str) -> str:
    """A word of the command line without the places of this machine: of a path outside this folder only the name."""
    path = Path(word)
    if not path.is_absolute() and ".." not in path.parts:
        return word
    here = Path.cwd()
    return str(path.resolve().relative_to(here)) if path.resolve().is_relative_to(here) else path.name


def are_apart(data: str, other: str) -> bool:
    """Whether two addresses are of different data; raises ``InputRejected`` where one holds the other."""
    here, there = Path(data).resolve(), Path(other).resolve()
    if here in there.parents or there in here.parents:
        raise InputRejected(
            f"{data} and {other}: one is within the other; give both as the same address, or two that are apart"
        )
    return here != there


def held_out(options: Options) -> Any:
    """The images to measure on. Where nothing else is taken from ``--data``, one without splits need not be divided."""
    from slimming.data import evaluation_set

    others = [options.calibration_address(), *([options.train_address()] if options.finetune_epochs else [])]
    apart = [are_apart(options.data, other) for other in others]
    images = evaluation_set(options.data, options.eval_images)
    if images.share == "all" or not all(apart):
        return images
    total = len(images.samples)
    count = min(options.eval_images or total, total)
    return dataclasses.replace(images, indices=[place * total // count for place in range(count)], share="all")


class NotMeasured(Exception):  # noqa: N818 - no error: the row says why it has no number
    """A row that this model or budget does not allow."""


class Bench:
    """A model and held-out images, preprocessed once, with the dense model's answers."""

    def __init__(self, options: Options) -> None:
        import torch
        from timm.data import create_transform

        from slimming.data import load_tensors
        from slimming.families import reader_of
        from slimming.models import load_model, parse_arguments
        from slimming.progress import Reporter
        from slimming.store import TensorStore

        if options.device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("--device cuda: PyTorch sees no CUDA device here")
        torch.set_num_threads(options.threads)
        self.options, self.reporter = options, Reporter()
        self.images = held_out(options)
        arguments = parse_arguments(options.model_arg)
        classes = len(self.images.labels)
        self.loaded = load_model(options.model, weights=options.weights, arguments=arguments, classes=classes)
        self.model = self.loaded.module.to(options.device)
        if self.model.num_classes != classes:
            raise InputRejected(f"{options.data} has {classes} classes, the model {self.model.num_classes}")
        self.reader = reader_of(self.model, options.model)
        self.batch_size = options.batch_size or (100 if self.reader.tokens <= 100 else 16)
        self.transform = create_transform(**self.loaded.data_config)
        self.pixels = TensorStore().empty(len(self.images), *self.loaded.data_config["input_size"])
        self.labels = torch.empty(len(self.images), dtype=torch.long)
        done = 0
        with self.reporter.bar("held-out images") as update:
            for batch, targets in load_tensors(self.images, self.transform, self.batch_size):
                rows = slice(done, done + len(batch))
                self.pixels[rows], self.labels[rows] = batch, targets
                done += len(batch)
                update(done, len(self.images))
        self.digests = {digest_of(image) for image in self.pixels}
        self.found_unseen: set[str] = set()
        self.dense = self.logits(self.model, "dense")

    def described(self) -> dict[str, Any]:
        """What the results are of: rows of another model or of other images do not go with them."""
        digest = hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()
        loaded, options = self.loaded, self.options
        return {
            "model": {
                "name": loaded.name,
                "architecture": loaded.architecture,
                "arguments": loaded.arguments,
                "weights": loaded.weights,
                "weights_sha256": loaded.weights_sha256,
                "data_config": loaded.data_config,
                "macs": self.dense_macs,
                "top1": float((self.dense.argmax(1) == self.labels).double().mean()),
            },
            "evaluation": {**self.images.describe(), "data": public(self.images.address), "fingerprint": digest},
            "calibration": {"data": public(options.calibration_address()), "images": options.calibration_images},
        }

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense model."""
        from slimming.plan import macs_of

        return macs_of([self.reader.tokens] * len(self.reader.blocks), self.reader.tokens, self.reader.geometry())

    def logits(self, module: Any, title: str) -> Any:
        """Logits (images, classes) of the held-out images."""
        import torch

        found = []
        with self.reporter.bar(title) as update, torch.inference_mode():
            for batch in torch.split(self.pixels, self.batch_size):
                found.append(module(batch.to(self.options.device)).float().cpu())
                update(sum(map(len, found)), len(self.pixels))
        return torch.cat(found)

    def measured(self, module: Any, title: str) -> dict[str, Any]:
        """Top-1 of ``module``, and how its answers differ from the dense model's; ``correct`` is a bit for each image."""
        import numpy as np

        logits = self.dense if module is self.model else self.logits(module, title)
        answers, dense = logits.argmax(1), self.dense.argmax(1)
        right, was = answers == self.labels, dense == self.labels
        log_p, log_q = self.dense.double().log_softmax(1), logits.double().log_softmax(1)
        return {
            "top1": float(right.double().mean()),
            "agreement": float((answers == dense).double().mean()),
            "kl": round(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), 6),
            "gained": int((right & ~was).sum()),
            "lost": int((was & ~right).sum()),
            "correct": base64.b64encode(np.packbits(right.numpy()).tobytes()).decode(),
        }

    def rival(self, case: Case) -> tuple[Any, dict[str, Any]]:
        """ToMe or EViT at the cost that the case's budget names, and what its row says of it; raises ``NotMeasured``."""
        from benchmarks.accuracy.rivals import evit_for_macs, tome_for_macs

        limit, cut = int((1 - case.budget) * self.dense_macs), bool(case.head_only)
        try:
            if case.method == "ToMe":
                tome = tome_for_macs(self.model, limit, head_only=cut)
                return tome, {"macs": tome.macs(), "counts": tome.counts, "matching_macs": tome.matching_macs()}
            evit = evit_for_macs(self.model, limit, head_only=cut, **EVIT_FORMS[case.form or ""])
            return evit, {"macs": evit.macs(), "counts": evit.counts, "keep_rate": evit.keep_rate}
        except (BudgetUnreachable, InputRejected) as error:
            raise NotMeasured(str(error)) from error

    def others(self, address: str, count: int, seed: int) -> Any:
        """Images to make plans from or to train on: never held-out ones, by address here and by pixels in ``unseen``."""
        from slimming.data import calibration_set

        images = calibration_set(address, count, seed, apart=are_apart(self.options.data, address))
        same = images.address == self.images.address and images.split == self.images.split
        if same and set(images.indices) & set(self.images.indices):
            raise InputRejected(f"{address}: holds images that are measured on")
        return images

    def unseen(self, images: Any, batch_size: int) -> Iterator[Any]:
        """Preprocessed batches of ``images``; raises ``InputRejected`` at the first one that is measured on."""
        from slimming.data import load_tensors

        for batch, _ in load_tensors(images, self.transform, batch_size):
            if any(digest_of(image) in self.digests for image in batch):
                raise InputRejected(f"{images.address}: an image of it is among the held-out images of {self.options.data}")
            yield batch

    def check_unseen(self, images: Any) -> None:
        """Raise ``InputRejected`` where one of ``images`` is measured on; the same images are looked at once."""
        described = json.dumps([images.describe(), images.indices])
        if described not in self.found_unseen:
            for _ in self.unseen(images, 64):
                pass
            self.found_unseen.add(described)


def digest_of(image: Any) -> bytes:
    """SHA-256 over a preprocessed image."""
    return hashlib.sha256(image.numpy().tobytes()).digest()


class Ours:
    """Plans and refitted models of one calibration draw and mode: every score and budget looks at the same dense features."""

    def __init__(self, bench: Bench, mode: Mode, seed: int) -> None:
        from slimming.features import BATCH, DenseFeatures

        options = bench.options
        images = bench.others(options.calibration_address(), options.calibration_images, seed)
        self.bench, self.seed, self.draw = bench, seed, (mode, seed)
        self.plans: dict[tuple[str, float], Any] = {}
        with bench.reporter.stages() as progress:
            batches = bench.unseen(images, BATCH)
            self.features = DenseFeatures(bench.reader, batches, len(images), mode=mode, progress=progress)
        self.features.progress = lambda stage, done, total: None

    def plan(self, score: ScoreName, budget: float) -> Any:
        """The plan that ``slimming.api.find`` makes of these images; raises ``NotMeasured``."""
        from slimming.api import make_plan
        from slimming.costs import MacsCost
        from slimming.merging import MergeSearch
        from slimming.profile import profile_within, uniform_within
        from slimming.scores import score_named
        from slimming.search import TopDownSearch

        if (score, budget) not in self.plans:
            features, reader = self.features, self.features.reader
            merging = score == "similarity"
            if merging and (features.mode == "stale" or not reader.head.fixed):
                raise NotMeasured("tokens are merged in compact form, under a head that reads single tokens")
            ranking = score_named(score, self.seed)
            search = MergeSearch(features) if merging else TopDownSearch(features, ranking)
            cost = MacsCost(search.tokens, search.depth, reader.geometry(), features.mode, merged=merging)
            limit = (1 - budget) * cost.dense()
            try:
                counts = (uniform_within if score == "uniform" else profile_within)(search, cost, limit)
            except BudgetUnreachable as error:
                raise NotMeasured(str(error)) from error
            found = search.by_counts(counts)
            name, merged_into = self.bench.loaded.architecture, found.merged_into
            self.plans[score, budget] = make_plan(reader.model, name, found.kept, mode=features.mode, merged_into=merged_into)
        return self.plans[score, budget]

    def slim(self, case: Case) -> tuple[Any, dict[str, Any]]:
        """The slimmed model of a case, and what its row says of it; raises ``NotMeasured``."""
        from slimming.compensate import can_compensate, compensate
        from slimming.slim_vit import SlimViT

        plan = self.plan(case.method, case.budget)  # type: ignore[arg-type]
        model = copy.deepcopy(self.bench.model)
        if case.fit == "closed-form":
            if not can_compensate(model):
                raise NotMeasured("a model whose blocks end in norms has no closed-form fit")
            compensate(model, self.features, plan)
        module = SlimViT(model, plan).eval()
        return module, {"macs": plan.macs(), "counts": plan.counts} | (self.finetuned(module) if case.finetune else {})

    def finetuned(self, module: Any) -> dict[str, Any]:
        """Fine-tune ``module`` in place, the dense original its teacher; checkpoints lie beside the results meanwhile."""
        from slimming.finetune import finetune
        from slimming.recipe import Recipe

        bench, options = self.bench, self.bench.options
        images = bench.others(options.train_address(), options.finetune_images, self.seed)
        bench.check_unseen(images)
        folder = options.output.with_suffix(".finetune.part")
        with bench.reporter.stages("steps") as progress:
            report = finetune(
                module,
                copy.deepcopy(bench.model),
                images,
                data_config=bench.loaded.data_config,
                recipe=Recipe(
                    epochs=options.finetune_epochs,
                    batch_size=options.finetune_batch_size,
                    lr=options.finetune_lr,
                    precision=options.finetune_precision,
                    seed=self.seed,
                ),
                checkpoint=folder,
                progress=progress,
            )
        shutil.rmtree(folder, ignore_errors=True)
        module.eval()
        return {"finetuned": report.as_dict()}


def measure(options: Options) -> dict[str, Any]:
    """Measure every row that is not in ``--output`` yet, writing each as it is done; the results. Raises ``DoorError``."""
    options.check()
    bench = Bench(options)
    described = bench.described()
    result = {"name": options.name, "command": options.command(), "machine": machine(options), **described}
    result["default"] = {"score": options.default_score, "fit": options.default_fit, "mode": options.modes[0]}
    rows = found_rows(options.output, described)
    wanted = [(key_of(case, described), case) for case in cases(options)]
    ours: Ours | None = None
    for number, (key, case) in enumerate(wanted, start=1):
        if key in rows:
            continue
        title, start = f"{number}/{len(wanted)} {case.title()}", time.perf_counter()
        if case.mode is not None and case.seed is not None and (ours is None or ours.draw != (case.mode, case.seed)):
            ours = None  # the features of one draw are enough to hold
            ours = Ours(bench, case.mode, case.seed)
        row = row_of(bench, ours, case, title)
        rows[key] = {"key": key, **dataclasses.asdict(case), **row, "seconds": round(time.perf_counter() - start, 1)}
        write(options.output, result, rows)
        bench.reporter.say(f"{title}: " + (f"{row['top1']:.2%}" if "top1" in row else row["refused"]))
    return write(options.output, result, rows)


def row_of(bench: Bench, ours: Ours | None, case: Case, title: str) -> dict[str, Any]:
    """What is measured of a case, or why it is not."""
    module: Any = bench.model
    row: dict[str, Any] = {"macs": bench.dense_macs, "counts": [bench.reader.tokens] * len(bench.reader.blocks)}
    try:
        if case.mode is not None and ours is not None:
            module, row = ours.slim(case)
        elif case.method != "dense":
            module, row = bench.rival(case)
    except NotMeasured as error:
        return {"refused": f"{case.method}: {error}"}
    return row | {"reduction": round(1 - row["macs"] / bench.dense_macs, 6), **bench.measured(module, title)}


def key_of(case: Case, described: dict[str, Any]) -> str:
    """What a row is a function of, in short."""
    parts = [identity(described), dataclasses.asdict(case)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def identity(described: dict[str, Any]) -> dict[str, Any]:
    """What tells one model, its held-out images and its calibration images from others."""
    model = {name: described["model"][name] for name in ("architecture", "arguments", "weights_sha256")}
    return {"model": model, "evaluation": described["evaluation"], "calibration": described["calibration"]}


def found_rows(path: Path, described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows measured before, by key; raises ``InputRejected`` where they are of something else."""
    if not path.exists():
        return {}
    found = read(path)
    there = identity(found)
    for part, here in json.loads(json.dumps(identity(described))).items():
        if differing := [name for name in here if there[part].get(name) != here[name]]:
            raise InputRejected(f"{path}: holds results of another {part} (its {', '.join(differing)}): take another --output")
    return {row["key"]: row for row in found["rows"]}


def read(path: Path) -> dict[str, Any]:
    """A results file; raises ``InputRejected``."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(row["key"], str) for row in found["rows"]) or not identity(found):
            raise ValueError("a row has no key")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputRejected(f"{path}: not a results file: {error}") from error
    return found


def write(path: Path, result: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the results whole, one row a line, with their summary."""
    from benchmarks.accuracy.plot import compared, summarised

    whole = {**result, "rows": list(rows.values())}
    whole |= {"summary": summarised(whole), "comparisons": compared(whole)}
    lines = []
    for name, value in whole.items():
        text = json.dumps(value)
        if name in ("rows", "summary", "comparisons"):
            text = "[\n  " + ",\n  ".join(json.dumps(each) for each in whole[name]) + "\n ]" if value else "[]"
        lines.append(f" {json.dumps(name)}: {text}")
    with atomic_path(path) as part:
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return whole


def machine(options: Options) -> dict[str, Any]:
    """What the results were measured with."""
    import timm
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    return {"cpu": cpu, "threads": options.threads, "device": device, "torch": torch.__version__, "timm": timm.__version__}


def main(options: Options) -> int:
    """Measure, or show what was measured; the results as Markdown on stdout."""
    from benchmarks.accuracy.plot import draw, markdown

    results = [read(path) for path in options.show] or [measure(options)]
    print("\n".join(markdown(result) for result in results))
    if options.figure:
        draw(results[0], options.figure)
    return 0


if __name__ == "__main__":
    description = "Accuracy at equal cost: ours, score by score, against ToMe and EViT."
    sys.exit(open_door(Options, main, prog="benchmarks.accuracy.tables", description=description))
