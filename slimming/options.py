"""Options that every command shares that takes a model and images: the one source of their names, defaults and help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from patchslim.choices import Criterion, FitChoice, Layout, Mode, ScoreName
from patchslim.errors import UsageError
from slimming.fitting.recipe import Recipe
from slimming.inputs import check_data, check_file, check_weights
from slimming.models.timm_names import check_model_name
from slimming.search.budget import Budget
from slimming.search.distillation import MIN_DISTILL_IMAGES, Distillation
from slimming.search.few_blocks import parse_merge_blocks
from slimming.search.request import PlanRequest

#: Of the MACs, where no budget is given.
DEFAULT_REDUCTION = 0.45
#: Points of top-1 that a slimmed model may lose, where nothing else is said.
DEFAULT_MARGIN = 0.2
_BUDGETS = ("macs-reduction", "tolerance", "tokens", "latency-reduction", "latency-budget-ms")


@dataclass(frozen=True)
class ModelGroup:
    """The Vision Transformer and its weights."""

    model: str = "vit_ti"
    """A preset (vit_ti vit_s vit_b deit_ti deit_s deit_b) or any timm model name."""
    model_arg: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Passed on to timm.create_model; may be given several times."""
    weights: str = "bundled"
    """bundled, pretrained (from timm's hub: the only option that uses the network), random, a safetensors or .pth file,
    or a folder that save_pretrained wrote."""
    ema: bool = False
    """Take the averaged weights that the file holds beside the others (state_dict_ema or model_ema)."""


@dataclass(frozen=True)
class ImageGroup:
    """The images that a plan is made from, and how they are prepared."""

    data: str = "digits"
    """Images: digits (built in), a folder, FILE.tar, hfds/NAME or wds/PATH, as timm reads them."""
    class_map: Path | None = None
    """A text file with the model's class names, one a line, in the order of its answers, as timm has it. Default: the names in
    the weights' file, else those of the training folders."""
    calibration_data: str | None = None
    """Images that the plan is made from, in the same forms; by default the train split of --data, or a fifth kept apart."""
    calibration_images: int = 256
    """How many of them."""
    seed: int = 0
    """Draws the calibration images and random weights."""
    img_size: int | None = None
    """Image side in pixels, where it is not the model's own."""
    mean: tuple[float, ...] = ()
    """Channel means of pixels in [0, 1], where they are not the model's own."""
    std: tuple[float, ...] = ()
    """Channel standard deviations of pixels in [0, 1], where they are not the model's own."""
    crop_pct: float | None = None
    """Share of the resized image's side that the centre crop keeps, where it is not the model's own."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None
    """How images are resized, where it is not the model's own way."""


@dataclass(frozen=True)
class BudgetGroup:
    """How much is dropped, and which tokens go."""

    macs_reduction: float | Literal["max"] | None = None
    """Fraction of the model's multiply-accumulates to remove. Default: 0.45, where none of the next four is given. max: the
    most that loses up to --max-top1-drop points on the calibration images (without labels: that changes so many answers)."""
    tolerance: float | None = None
    """Instead of --macs-reduction: the relative error that each cut may cause in the block above (the paper: 0.01, 0.02)."""
    tokens: str | None = None
    """Instead: how many tokens each block outputs, first to last, as 197,197,160,...; the scores choose which."""
    latency_reduction: float | Literal["max"] | None = None
    """Instead: fraction of the engine's measured latency to remove, or max; export.run measures, or give --latency-table."""
    latency_budget_ms: float | None = None
    """Instead: milliseconds that one batch may take, on the same table."""
    latency_table: Path | None = None
    """A latency_table.json that an earlier export.run measured (it is in its bundle)."""
    merge_blocks: Annotated[str | None, tyro.conf.arg(metavar="auto|ramp|N|B,B,...")] = None
    """Where tokens go: a ramp over all blocks, N blocks whose places are searched, or these blocks, counted from 1 ("7,": block
    7 alone). auto takes three, evenly spread, unless their answers diverge by over 5 % more than the ramp's before the fit.
    Default: auto where tokens are merged, but for trt, whose engines have fewest kernels with a ramp; else ramp."""
    snap: int = 1
    """Round token counts to multiples of this, within the budget; 8 suits most GPUs."""
    score: ScoreName = "auto"
    """Which tokens go. similarity merges those that are most alike into constant means; the others drop those that rank lowest:
    paper (Eq. 6), residual, attention, random (chance), uniform (paper, and one count for all blocks).
    auto is similarity where it goes with the rest (heads that read single tokens, any budget but --tolerance), else paper."""
    mode: Mode = "compact"
    """What later blocks see of a dropped token: nothing (compact), or its last value (stale)."""
    summary: bool = False
    """With a score that drops tokens: keep their mean as one more token (measure first: it helps some checkpoints only)."""


@dataclass(frozen=True)
class FittingGroup:
    """How the slimmed blocks are fitted to the cut, and where PyTorch runs."""

    fit: FitChoice = "closed-form"
    """Refit the slimmed blocks: not (none), by ridge regression (closed-form), or the paper's gradient descent (sgd).
    distill is closed-form, and then all weights learn the dense model's answers and features, without labels.
    auto distils from 1,024 calibration images on, where there is a GPU or it would take a core at most 15 minutes."""
    distill_steps: int = Distillation.steps
    """Steps of --fit distill, of 128 images each; about as long as as many steps of training."""
    distill_lr: float = Distillation.lr
    """Peak learning rate of --fit distill; hundreds of steps on thousands of images may take more."""
    finetune_epochs: float = 0.0
    """Then fine-tune the whole slimmed model on --train-data for this long; may be fractional."""
    train_data: str | None = None
    """Labelled images to fine-tune on, in the forms of --data; by default the train split of --data."""
    train_images: int | Literal["all"] = "all"
    """How many of them."""
    finetune_lr: float | None = None
    """Peak learning rate. Default: two fifths of DeiT's, scaled with the batch."""
    finetune_batch_size: int = 64
    """Images per step and process while fine-tuning."""
    distill: float = 0.5
    """Weight of the dense original's answers against the labels while fine-tuning; 0 is labels alone."""
    finetune_precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision while fine-tuning or distilling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where PyTorch runs; auto takes a GPU when there is one."""


@dataclass(frozen=True)
class ModelOptions(FittingGroup, BudgetGroup, ImageGroup, ModelGroup):
    """The model, its weights, the images that a plan is made from, the budget and the fit."""

    def preprocessing(self) -> dict[str, Any]:
        """Return the overrides of the model's data config, by timm's names."""
        return {
            "img_size": self.img_size,
            "mean": self.mean or None,
            "std": self.std or None,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
        }

    @property
    def budget(self) -> Budget:
        """What is asked of the plan; raises ``UsageError`` where ``--tokens`` cannot be read."""
        if self.tokens is not None:
            try:
                counts = tuple(int(count) for count in self.tokens.split(","))
            except ValueError as error:
                raise UsageError(f"--tokens {self.tokens}: must be whole numbers with commas between") from error
            return Budget("tokens", tokens=counts, snap=self.snap)
        names: tuple[Criterion, ...] = ("tolerance", "latency-reduction", "latency-budget-ms")
        for name in names:
            if (value := getattr(self, name.replace("-", "_"))) is not None:
                return self._reduction(name, value)
        asked = DEFAULT_REDUCTION if self.macs_reduction is None else self.macs_reduction
        return self._reduction("macs-reduction", asked)

    def _reduction(self, criterion: Criterion, value: float | Literal["max"]) -> Budget:
        if value == "max":
            return Budget(criterion, 0.0, snap=self.snap, within=self.margin)
        return Budget(criterion, value, snap=self.snap)

    @property
    def margin(self) -> float:
        """Points of top-1 that a largest reduction may lose."""
        return DEFAULT_MARGIN

    @property
    def given_budgets(self) -> list[str]:
        """The options that say how much is dropped, as far as they were given."""
        return [f"--{name}" for name in _BUDGETS if getattr(self, name.replace("-", "_")) is not None]

    def request(self, layout: Layout = "split") -> PlanRequest:
        """Return what is asked of the plan, its cut projections laid as ``layout``."""
        distillation = Distillation(steps=self.distill_steps, lr=self.distill_lr, precision=self.finetune_precision)
        where = None if self.merge_blocks is None else parse_merge_blocks(self.merge_blocks)
        fit = "closed-form" if self.fit == "auto" and self.finetune_epochs else self.fit  # labels teach the same and more
        return PlanRequest(self.budget, self.score, fit, self.mode, layout, self.summary, distillation, where)

    def resolved_score(self, *, fixed_head: bool) -> ScoreName:
        """Return what the score ``auto`` stands for, for a model whose head reads single tokens or not.

        Raises ``UsageError`` where what is asked does not go with such a head.
        """
        return self.request().for_model(fixed_head=fixed_head).score

    def merges(self, *, fixed_head: bool) -> bool:
        """Return whether the plan will merge tokens, of a model whose head reads single tokens or not.

        Raises ``UsageError`` where what is asked does not go with such a head.
        """
        return self.request().for_model(fixed_head=fixed_head).merges

    @property
    def recipe(self) -> Recipe:
        """How the slimmed model is fine-tuned."""
        return Recipe(
            epochs=self.finetune_epochs,
            batch_size=self.finetune_batch_size,
            lr=self.finetune_lr,
            distill=self.distill,
            precision=self.finetune_precision,
            seed=self.seed,
        )

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if self.calibration_images < 1:
            raise UsageError(f"--calibration-images {self.calibration_images}: must be at least 1")
        if len(self.given_budgets) > 1:
            raise UsageError(f"{' and '.join(self.given_budgets)} contradict each other", next_step="give one of them")
        self.request().check()
        if self.fit == "distill":
            self._check_distill()
        if self.finetune_epochs:
            self.recipe.check()
        if self.train_images != "all" and self.train_images < 1:
            raise UsageError(f"--train-images {self.train_images}: must be at least 1, or all")
        if self.img_size is not None and self.img_size < 1:
            raise UsageError(f"--img-size {self.img_size}: must be at least 1")
        if any(len(values) not in (0, 1, 3) for values in (self.mean, self.std)):
            raise UsageError("--mean and --std take one value, or one per channel")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise UsageError("--mean and --std must be finite")
        if any(value <= 0 for value in self.std):
            raise UsageError("--std must be above 0")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 4:
            raise UsageError(f"--crop-pct {self.crop_pct}: must be a share above 0, at most 4")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}: must be from 0 to below 2^63")
        if not self.data or self.calibration_data == "":
            raise UsageError("--data and --calibration-data must not be empty")

    def _check_distill(self) -> None:
        if self.finetune_epochs:
            raise UsageError(
                "--fit distill and --finetune-epochs both train all weights",
                next_step="leave one of them out: with labels, fine-tuning has the dense model's answers too",
            )
        if self.calibration_images < MIN_DISTILL_IMAGES:
            raise UsageError(
                f"--calibration-images {self.calibration_images}: --fit distill needs at least {MIN_DISTILL_IMAGES}, "
                "and thousands do better"
            )

    def check_inputs(self) -> None:
        """Raise ``InputRejected`` where what the options name is not there. Quick: nothing is loaded."""
        check_model_name(self.model)
        check_weights(self.weights)
        for address in (self.data, self.calibration_data, self.train_data if self.finetune_epochs else None):
            if address is not None:
                check_data(address)
        if self.latency_table is not None:
            check_file(self.latency_table, "latency table")
        if self.class_map is not None:
            check_file(self.class_map, "--class-map")
