"""What the accuracy tables have: the options of ``benchmarks.accuracy.tables``, and the list of rows that they ask for."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from patchslim.choices import Fit, FitChoice, Mode, ScoreName
from patchslim.errors import InputRejected, UsageError
from slimming.run import SlimmingOptions

#: What ``python -m slimming.run`` does when it is told nothing: the tables' defaults are these.
DEFAULT = SlimmingOptions()

SCORES: tuple[ScoreName, ...] = ("similarity", "paper", "residual", "attention", "random", "uniform")
FITS: tuple[Fit, ...] = ("none", "closed-form")
#: EViT's ways with the tokens that it does not keep; the paper's text leaves room for all of them.
EVIT_FORMS: dict[str, dict[str, bool]] = {"summed": {}, "averaged": {"normalised": True}, "dropped": {"fuse": False}}

RESOLUTION, BLOCKS = "resolution", "blocks-"
#: Other ways to spend the same MACs, as ``benchmarks.accuracy.other_plans`` says; those but the first are fitted like ours.
OTHERS: tuple[str, ...] = (RESOLUTION, "radial", "DiffRate", f"{BLOCKS}auto", f"{BLOCKS}2", f"{BLOCKS}3")


class Row(TypedDict, total=False):
    """One row of a results file: what was measured of a case, or ``refused``, why it was not.

    ``macs``, ``counts`` (tokens out of each block) and ``reduction`` are what it costs. ``top1`` and ``agreement`` (with the
    dense model's answers) are fractions, ``kl`` is the divergence from it, ``gained`` and ``lost`` count images, ``correct`` is
    a bit for each held-out image, in base64. ``matching_macs`` and ``keep_rate`` are of ToMe and EViT, ``side`` (pixels) is of
    a lower resolution.
    """

    key: str
    method: str
    budget: float
    fit: Fit | None
    mode: Mode | None
    seed: int | None
    head_only: bool | None
    form: str | None
    finetune: dict[str, Any] | None
    macs: int
    counts: list[int]
    reduction: float
    top1: float
    agreement: float
    kl: float
    gained: int
    lost: int
    correct: str
    seconds: float
    matching_macs: int
    keep_rate: float
    side: int
    finetuned: dict[str, Any]
    refused: str


@dataclasses.dataclass(frozen=True)
class SubjectOptions:
    """What is measured: the options that every accuracy benchmark has."""

    name: str = "digits"
    """What the results are called."""
    model: str = DEFAULT.model
    """A preset or any timm model name."""
    model_arg: tuple[str, ...] = ()
    """key=value pairs for timm.create_model."""
    weights: str = DEFAULT.weights
    """bundled, pretrained, random or a weights file."""
    data: str = DEFAULT.data
    """Held-out images: digits, a folder, FILE.tar, hfds/NAME or wds/PATH."""
    calibration_data: str | None = None
    """Images that plans and fits are made from; by default the part of --data that is not held out."""
    eval_images: int | None = 2000
    """How many held-out images; None is all."""
    calibration_images: int = DEFAULT.calibration_images
    """How many images a plan is made from."""
    budgets: tuple[float, ...] = (0.30, 0.45, 0.60)
    """Fractions of the dense multiply-accumulates that we remove."""
    threads: int = 1
    """Threads; of PyTorch on the CPU, and of ONNX Runtime."""

    def command_of(self, module: str, unnamed: Collection[str]) -> str:
        """The command line of these options, but for those ``unnamed``; of a path outside this folder only the name is told."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default or field.name in unnamed:
                continue
            name, values = field.name.replace("_", "-"), value if isinstance(value, tuple) else (value,)
            if field.type == "bool":
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", *(public(str(each)) for each in values)]
        return shlex.join(["python", "-m", module, *words])


@dataclasses.dataclass(frozen=True)
class TableOptions(SubjectOptions):
    """Options of ``benchmarks.accuracy.tables``."""

    train_data: str | None = None
    """Images to fine-tune on; by default those of --calibration-data."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws its own calibration images, and its own random score."""
    scores: tuple[ScoreName, ...] = SCORES
    """The scores that plans are made by."""
    others: tuple[str, ...] = OTHERS
    """Other ways to spend the same MACs: resolution, radial, DiffRate, blocks-N; '' is none."""
    modes: tuple[Mode, ...] = (DEFAULT.mode,)
    """What later blocks see of a dropped token."""
    default_score: ScoreName = DEFAULT.score
    """The score whose rows are marked as ours; auto is the one that slimming.run takes."""
    default_fit: FitChoice = DEFAULT.fit
    """The fit whose rows are marked as ours."""
    finetune_epochs: float = 0
    """Epochs of fine-tuning of our default, for the first seed; 0 skips it."""
    finetune_images: int = 10_000
    """How many images an epoch has."""
    finetune_batch_size: int = DEFAULT.finetune_batch_size
    """Images per step of fine-tuning."""
    finetune_lr: float | None = DEFAULT.finetune_lr
    """Peak learning rate of fine-tuning; None is slimming.run's default for the batch."""
    finetune_precision: Literal["no", "bf16"] = "no"
    """Mixed precision of fine-tuning."""
    finetune_reductions: tuple[float, ...] = (0.462,)
    """Budgets that fine-tuning is measured at, besides --budgets."""
    batch_size: int | None = None
    """Images at once; by default 100, and 16 where an image has more than 100 tokens."""
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
        if unknown := [name for name in self.other_methods if not is_other(name)]:
            raise UsageError(
                f"--others {unknown[0]}: must be resolution, radial, DiffRate, {BLOCKS}auto or {BLOCKS}N, as {BLOCKS}2"
            )
        if self.default_fit not in FITS:
            raise UsageError(f"--default-fit {self.default_fit}: the tables have {' and '.join(FITS)}")
        if self.finetune_epochs < 0:
            raise UsageError("--finetune-epochs must not be negative")
        self.slimming(self.default_case()).check()

    @property
    def other_methods(self) -> list[str]:
        """The other ways that are asked for."""
        return [name for name in self.others if name]

    def calibration_address(self) -> str:
        """Where plans and fits are made from."""
        return self.calibration_data or self.data

    def train_address(self) -> str:
        """What is fine-tuned on."""
        return self.train_data or self.calibration_address()

    def command(self) -> str:
        """The command line that these options come from."""
        return self.command_of("benchmarks.accuracy.tables", ("figure",))

    def default_case(self) -> Case:
        """The row that is marked as ours, at the first budget and seed."""
        finetune = self.finetune_record() if self.finetune_epochs else None
        return Case(self.default_score, self.budgets[0], self.default_fit, self.modes[0], self.seeds[0], finetune=finetune)

    def finetune_record(self) -> dict[str, Any]:
        """What the rows that are fine-tuned say of how."""
        record = {"epochs": self.finetune_epochs, "images": self.finetune_images, "data": public(self.train_address())}
        record |= {"batch_size": self.finetune_batch_size, "lr": self.finetune_lr}
        return record | ({} if self.finetune_precision == "no" else {"precision": self.finetune_precision})

    def slimming(self, case: Case) -> SlimmingOptions:
        """The options of ``python -m slimming.run`` that give the plan and the weights of a row of ours.

        A row named by its score has a ramp, so that scores are told apart by what they drop; ``blocks-auto`` is the default.
        """
        ramp = case.method in ("auto", "similarity")  # the others have one by default
        options = SlimmingOptions(
            model=self.model,
            model_arg=self.model_arg,
            weights=self.weights,
            data=self.data,
            calibration_data=self.calibration_data,
            calibration_images=self.calibration_images,
            macs_reduction=case.budget,
            merge_blocks="ramp" if ramp else None,
            score="auto" if is_other(case.method) else cast(ScoreName, case.method),
            fit=cast(Fit, case.fit),
            mode=case.mode or DEFAULT.mode,
            seed=case.seed or 0,
            device=self.device,
        )
        if not case.finetune:
            return options
        return dataclasses.replace(
            options,
            finetune_epochs=self.finetune_epochs,
            train_data=self.train_address(),
            train_images=self.finetune_images,
            finetune_batch_size=self.finetune_batch_size,
            finetune_lr=self.finetune_lr,
            finetune_precision=self.finetune_precision,
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """One row to measure; ``budget`` is the fraction of the dense multiply-accumulates to remove."""

    method: str  # dense, a score, ToMe, EViT, or another way to spend the MACs
    budget: float = 0.0
    fit: str | None = None
    mode: Mode | None = None
    seed: int | None = None
    head_only: bool | None = None  # of a baseline: whether its last block is cut to the class token, as ours is
    form: str | None = None  # of EViT
    finetune: dict[str, Any] | None = None

    def title(self) -> str:
        """What a log line calls it."""
        parts = [self.method, self.fit, self.mode, self.form, "last block cut" if self.head_only else None]
        parts += ["fine-tuned"] if self.finetune else []
        return ", ".join([*(part for part in parts if part), f"-{self.budget:.1%}"]) + (
            "" if self.seed is None else f", seed {self.seed}"
        )


def cases(options: TableOptions) -> list[Case]:
    """Every row that the options ask for, in the order in which they are measured."""
    rows = [Case("dense")]
    for budget, cut in itertools.product(options.budgets, (False, True)):
        rows.append(Case("ToMe", budget, head_only=cut))
        rows += [Case("EViT", budget, head_only=cut, form=form) for form in EVIT_FORMS]
        rows += [Case(name, budget, head_only=False) for name in options.other_methods if name == RESOLUTION and not cut]
    for mode, seed, budget in itertools.product(options.modes, options.seeds, options.budgets):
        rows += [Case(score, budget, fit, mode, seed) for score in options.scores for fit in FITS]
        if mode == "compact":
            rows += [Case(name, budget, "closed-form", mode, seed) for name in options.other_methods if name != RESOLUTION]
    if options.finetune_epochs:
        for budget in sorted({*options.finetune_reductions, *options.budgets}):
            rows.append(dataclasses.replace(options.default_case(), budget=budget))
    return rows


def is_other(method: str) -> bool:
    """Whether a row is one of ``OTHERS``, of any number of merging blocks."""
    return method in OTHERS or is_blocks(method)


def is_blocks(name: str) -> bool:
    """Whether a row is named blocks-auto or blocks-N."""
    number = name.removeprefix(BLOCKS)
    return name.startswith(BLOCKS) and (number == "auto" or (number.isascii() and number.isdigit() and int(number) > 0))


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
