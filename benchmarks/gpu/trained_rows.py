"""The headline's rows with training: distilled from unlabelled images, and fine-tuned with their controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from benchmarks.gpu.headline_run import Headline, HeadlineOptions
from benchmarks.gpu.untrained_rows import Student
from slimming.fitting.recipe import Recipe
from slimming.search.distillation import Distillation

#: What is fine-tuned at the default budgets, in this order.
FINE_TUNED: tuple[str, ...] = ("dense", "slim-46.2%", "slim-60.0%", "slim-45.0%", "ramp-46.2%", "at-176px")


def distilled(run: Headline, students: dict[str, Student]) -> None:
    """Measure the default plans distilled from unlabelled calibration images."""
    options = run.options
    recipe = Recipe(
        epochs=options.distill_steps * options.distill_batch / min(options.distilled_images, len(run.images)),
        batch_size=options.distill_batch,
        lr=options.distill_lr,
        distill=1.0,
        label_smoothing=0.0,
        features=Distillation.features,
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


def keep_weights(module: Any, path: Path) -> None:
    """Write the weights of a fine-tuned model in half precision."""
    network = getattr(module, "model", module)
    save_file({name: value.half().cpu().contiguous() for name, value in network.state_dict().items()}, path)
