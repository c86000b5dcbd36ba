"""Whole-network fine-tuning of a slimmed ViT: DeiT's recipe scaled to a short schedule, the dense original as the teacher.

What is DeiT's and kept: AdamW; weight decay 0.05 on matrices alone; label smoothing 0.1; cosine decay to 1/50 of the learning
rate; a learning rate proportional to the total batch over 512. What is scaled:

- the learning rate: a slimmed model starts near where it should end; see ``slimming.fitting.recipe.LR_SHARE``.
- EMA: DeiT's decay of 0.99996 averages over 25,000 of its 375,000 steps; here over the same share, a fifteenth, of the steps.
- warm-up: a twentieth of the steps (DeiT: a sixtieth), so that Adam's moments settle in a short run too.
- augmentation: the image as in evaluation, mirrored and moved by up to an eighth over a reflected border (DeiT: for small
  images; DeiT III: for all, by less); no RandAugment, erasing, mixup or cutmix unless asked for. Those, and crops of 8 % of an
  image, keep 300 epochs from overfitting, and a strong crop moves the subject away from where the plan expects it. Measured on
  ViT-Ti at 224 px, 46 % of its MACs cut, 40 steps on CIFAR-10 training images: the KL divergence to the original, on 1,000
  others, went from .059 to .066 with crops of half the image or more, and to .060 as it is now (learning rate 2.5e-5, batch
  32, teacher alone).

Stochastic depth is off: ``SlimViT`` has none. The soft teacher, at temperature 1 and weight 0.5, is DynamicViT's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from patchslim.errors import InputRejected, UsageError
from patchslim.progress import StageProgress
from slimming.data.source import ImageSet
from slimming.fitting.feature_targets import DenseTargets, SlimStreams, feature_loss
from slimming.fitting.finetune_checkpoint import as_found, resume, save
from slimming.fitting.finetune_data import Draws, identity_of, loader_of, read, train_transform
from slimming.fitting.recipe import FinetuneReport, Recipe
from slimming.models.fused_attention import unfused_attention
from slimming.models.slim_vit import SlimViT
from slimming.models.weights import state_digest

_LEAST_LR, _WARMUP_LR = 1 / 50, 1 / 500  # of the learning rate, as in DeiT
_EMA_SHARE = 25_000 / 375_000  # of the steps, as in DeiT
#: What makes the batches of steps ``start`` to ``stop`` of a run, on its device: images (b, 3, h, w) and classes (b,), or
#: shares of classes (b, classes). The same for the same steps, wherever a run is taken up.
Feed: TypeAlias = Callable[[int, int], Iterable[tuple[Tensor, Tensor]]]
_SAVES = 20  # checkpoints in a run where no interval is asked for


class _Position:
    """Where a run is; kept in its checkpoints."""

    def __init__(self, device: torch.device) -> None:
        self.step, self.seconds, self.loss = 0, 0.0, torch.zeros((), device=device)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "loss": float(self.loss)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.loss.fill_(state["loss"])


def finetune(
    slim: nn.Module,
    teacher: nn.Module | None,
    images: ImageSet,
    *,
    data_config: dict[str, Any],
    recipe: Recipe,
    checkpoint: Path | None = None,
    checkpoint_steps: int | None = None,
    feed: Feed | None = None,
    feed_identity: str | None = None,
    progress: StageProgress | None = None,
) -> FinetuneReport:
    """Train ``slim`` (a ``SlimViT``) in place on labelled ``images``; at the end it holds the averaged (EMA) weights.

    ``teacher`` is the dense original, a module of its own that maps the same images to the same classes; without one, labels
    alone teach. ``data_config`` is timm's. Runs where ``slim`` is, or on one device per process under ``torchrun``, where
    every process must call it; each ends with equal weights. With a folder ``checkpoint`` the run's state is saved there every
    ``checkpoint_steps`` steps (a twentieth of the run by default), whole or not at all, and a call with the same arguments
    goes on from it: on a CPU to the same weights, bit for bit, as without the interruption. Of a folder's pickles only
    tensors, numbers and text are taken. ``feed`` makes the batches in place of a loader of ``images``, which then say only how
    long an epoch is and, with ``feed_identity``, which run this is. ``progress`` is called with ("fine-tuning", steps done,
    steps), by the first process only.

    On any error ``slim`` is put back to the weights that it came with; flags, devices and generators always are. No other
    ``Accelerator`` may be in use. Raises ``UsageError`` for a recipe that means nothing here or that diverges, and
    ``InputRejected`` for images that cannot be used or a checkpoint of another run.
    """
    recipe.check()
    if not len(images):
        raise InputRejected(f"{images.address}: no images to fine-tune on")
    given = {id(parameter) for parameter in slim.parameters()}
    if teacher is not None and any(id(parameter) in given for parameter in teacher.parameters()):
        raise InputRejected("the teacher shares parameters with the slimmed model: give it a deep copy of the original")
    if recipe.features and (teacher is None or not isinstance(slim, SlimViT)):
        raise UsageError("fine-tuning: features are the dense original's, for a SlimViT: give both, or leave features at 0")
    if teacher is None or (recipe.distill == 0 and not recipe.features):
        teacher = None
    with as_found(slim, teacher, images.samples):
        slim.requires_grad_(True)
        accelerator = _accelerator(recipe, next(slim.parameters()).device)
        try:
            with unfused_attention(slim) if accelerator.device.type == "cpu" else contextlib.nullcontext():
                run = _Run(slim, teacher, images, data_config, recipe, feed_identity)
                return _train(accelerator, run, feed, checkpoint, checkpoint_steps, progress)
        finally:
            for name in ("_is_accelerate_prepared", "forward", "_original_forward"):  # marks that Accelerate leaves
                slim.__dict__.pop(name, None)
            _forget()


def _accelerator(recipe: Recipe, device: torch.device) -> Accelerator:
    cpu = device.type == "cpu"
    if cpu and recipe.precision == "fp16":
        raise UsageError("fine-tuning: precision fp16 needs a GPU; take bf16 or no")
    _forget()  # else the precision and device of an earlier run would stay
    return Accelerator(
        mixed_precision=recipe.precision,
        cpu=cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass(frozen=True)
class _Run:
    """All that a run is a function of, but for the number of processes."""

    slim: nn.Module
    teacher: nn.Module | None
    images: ImageSet
    data_config: dict[str, Any]
    recipe: Recipe
    feed_identity: str | None = None  # tells the batches of a feed from others of the same images

    def parts(self, processes: int) -> dict[str, Any]:
        """Return what tells the run and its checkpoints from others, in JSON's types."""
        slim, teacher = self.slim, self.teacher
        return {
            "recipe": asdict(self.recipe),
            "plan": {
                "stale": bool(getattr(slim, "stale", False)),
                "rows": state_digest(dict(slim.named_buffers())),  # of SlimViT: the tokens that each block keeps
            },
            "weights": state_digest(slim.state_dict()),
            "teacher": None if teacher is None else state_digest(teacher.state_dict()),
            "images": identity_of(self.images),
            "preprocessing": {
                key: self.data_config.get(key)
                for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
            },
            "processes": processes,
        } | ({} if self.feed_identity is None else {"feed": self.feed_identity})


def _train(
    accelerator: Accelerator,
    run: _Run,
    feed: Feed | None,
    checkpoint: Path | None,
    checkpoint_steps: int | None,
    progress: StageProgress | None,
) -> FinetuneReport:
    slim, teacher, images, recipe = run.slim, run.teacher, run.images, run.recipe
    total = recipe.batch_size * accelerator.num_processes
    steps = max(1, round(recipe.epochs * len(images) / total))
    lr = recipe.learning_rate(total)
    parts = run.parts(accelerator.num_processes)
    network: Any = getattr(slim, "model", slim)

    set_seed(recipe.seed, device_specific=True)
    slim.to(accelerator.device).train()
    if teacher is not None:
        teacher.to(accelerator.device).eval()
    optimizer, scheduler = _optimiser(network, recipe, lr, steps)
    decay = recipe.ema if recipe.ema is not None else max(0.0, 1 - 1 / max(1.0, _EMA_SHARE * steps))
    average = ModelEmaV3(slim, decay=decay)
    position = _Position(accelerator.device)
    student: nn.Module = slim
    if recipe.features and teacher is not None:
        assert isinstance(slim, SlimViT)
        student, teacher = SlimStreams(slim), DenseTargets(teacher, slim.plan)
    wrapped, optimizer = accelerator.prepare(student, optimizer)
    classes = int(network.num_classes)
    feed = feed or _LoaderFeed(accelerator, run, total, classes)
    states = {"average": average, "schedule": scheduler, "position": position}  # the checkpoint's part beside Accelerate's
    if checkpoint is not None:
        resume(accelerator, checkpoint, parts, states)

    mix = _mix(recipe, classes)
    interval = checkpoint_steps or math.ceil(steps / _SAVES)
    start = time.perf_counter() - position.seconds
    if position.step < steps:
        if progress is not None and accelerator.is_main_process:
            progress("fine-tuning", position.step, steps)
        for inputs, labels in feed(position.step, steps):
            mixed, targets = (inputs, labels) if mix is None else mix(inputs, labels)
            loss = _loss(accelerator, wrapped, teacher, mixed, targets, recipe)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(wrapped.parameters(), recipe.clip_grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            position.step += 1
            scheduler.step_update(position.step)
            average.update(slim, step=position.step)
            position.loss.lerp_(loss.detach(), 1 / min(position.step, 50))
            position.seconds = time.perf_counter() - start
            if position.step == steps or position.step % interval == 0:
                position.loss.copy_(accelerator.reduce(position.loss, "mean"))
                if not bool(position.loss.isfinite()):
                    raise UsageError(
                        f"fine-tuning diverged before step {position.step} of {steps}: take a lower lr than {lr:g}"
                    )
                if checkpoint is not None:
                    save(accelerator, checkpoint, parts, position.step, states)
            if progress is not None and accelerator.is_main_process:
                progress("fine-tuning", position.step, steps)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    slim.load_state_dict(average.module.state_dict())
    return FinetuneReport(
        epochs=steps * total / len(images),
        steps=steps,
        images=steps * total,
        loss=float(position.loss),
        lr=lr,
        seconds=position.seconds,
        fingerprint=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
    )


class _LoaderFeed:
    """The batches of a run from its images, this process's share of each, decoded and augmented by worker processes."""

    def __init__(self, accelerator: Accelerator, run: _Run, total: int, classes: int) -> None:
        self.accelerator, self.run, self.total, self.classes = accelerator, run, total, classes

    def __call__(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of steps ``start`` to ``stop`` of the run."""
        images, recipe = self.run.images, self.run.recipe
        hflip = recipe.hflip if recipe.hflip is not None else 0.5 if images.mirrored_alike else 0.0
        transform = train_transform(self.run.data_config, hflip=hflip, auto_augment=recipe.auto_augment)
        draws = Draws(images, transform, count=stop * self.total, classes=self.classes, seed=recipe.seed)
        loader = loader_of(draws, recipe.batch_size, cuda=self.accelerator.device.type == "cuda")
        yield from read(images, skip_first_batches(self.accelerator.prepare(loader), start))


def _optimiser(network: Any, recipe: Recipe, lr: float, steps: int) -> tuple[Any, Any]:
    """AdamW and its cosine; timm's model (not ``SlimViT``) says which of its parameters are not to decay."""
    optimizer = create_optimizer_v2(network, "adamw", lr=lr, weight_decay=recipe.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=steps,
        warmup_epochs=min(steps - 1, round(recipe.warmup * steps)),
        warmup_lr=lr * _WARMUP_LR,
        min_lr=lr * _LEAST_LR,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return optimizer, scheduler


def _loss(
    accelerator: Accelerator, wrapped: Any, teacher: nn.Module | None, inputs: Tensor, targets: Tensor, recipe: Recipe
) -> Tensor:
    """(1 - w) cross entropy + w tau^2 KL(original || slim), the soft distillation of Hinton et al. (2015); w is ``distill``.

    With ``features`` the error of the blocks' tokens is added, in the weight that it says.
    """
    answered = wrapped(inputs)
    logits, streams = answered if isinstance(answered, tuple) else (answered, [])
    logits = logits.float()
    smoothing = recipe.label_smoothing if targets.ndim == 1 else 0.0  # mixed targets are smooth already
    labelled = functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    if teacher is None:
        return labelled
    with torch.no_grad(), accelerator.autocast():
        known = teacher(inputs)
    known, wanted = known if isinstance(known, tuple) else (known, [])
    if known.shape != logits.shape:
        raise InputRejected(f"the teacher gives logits {tuple(known.shape)}, the slimmed model {tuple(logits.shape)}")
    student, target = ((value.float() / recipe.temperature).log_softmax(-1) for value in (logits, known))
    divergence = functional.kl_div(student, target, log_target=True, reduction="batchmean")
    loss = (1 - recipe.distill) * labelled + recipe.distill * recipe.temperature**2 * divergence
    return loss + recipe.features * feature_loss(streams, wanted) if wanted else loss


def _mix(recipe: Recipe, classes: int) -> Mixup | None:
    if not (recipe.mixup or recipe.cutmix):
        return None
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
