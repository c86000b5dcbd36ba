"""The headline's rows without training, and the models that the trained rows start from."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from benchmarks.accuracy.resolution import at_resolution, dense_macs, resampled
from benchmarks.accuracy.rows import Case
from benchmarks.gpu.headline_run import Headline
from slimming.models.slim_vit import SlimViT

if TYPE_CHECKING:
    from slimming.api import FoundPlan

#: What makes a model to train: a fresh copy with the weights it starts from, and how many of the MACs it saves.
Student = tuple[Callable[[], nn.Module], float]


def training_free(run: Headline) -> dict[str, Student]:
    """Measure the rows without training; what the trained rows start from, by name."""
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
        reduction = round(1 - dense_macs(resampled(bench.model, side), bench.options.model) / dense, 5)
        students[name] = (lambda side=side: at_resolution(bench.model, side), reduction)  # type: ignore[misc]
        if name not in run.rows:
            run.add(name, students[name][0](), reduction=reduction, kind="training-free")
    return students


def plans(run: Headline) -> dict[str, tuple[FoundPlan, float]]:
    """The default plan and one that merges in every block at every budget, with the seconds that each took."""
    wanted: dict[str, tuple[float, str | None]] = {}
    for budget in run.options.budgets:
        wanted |= {f"slim-{budget:.1%}": (budget, None), f"ramp-{budget:.1%}": (budget, "ramp")}
    found: dict[str, tuple[FoundPlan, float]] = {}
    for name, (budget, merge_blocks) in wanted.items():
        start = time.monotonic()
        found[name] = (run.found(budget, merge_blocks), time.monotonic() - start)
        run.say(f"{name}: found in {found[name][1]:.1f} s, {run.elapsed():.0f} s gone")
    run.bench.model.to(run.device)
    return found


def lower_sides(size: int, tiny: bool) -> list[int]:
    """Sides of images that save about 41, 52 and 61 % of ViT-Ti's MACs at 224 px."""
    return [32] if tiny else [side for side in (176, 160, 144) if side < size]
