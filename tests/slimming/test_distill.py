"""Label-free reconstruction: it comes closer to the dense model on other images, and can be interrupted and shared out."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from patchslim.choices import Fit
from patchslim.errors import InputRejected, UsageError
from slimming.api import FinderSettings, PlanFinder
from slimming.data.source import ImageSet
from slimming.distributed import SINGLE_PROCESS, ProcessGroup
from slimming.fitting.distill import BlendedImages, distill
from slimming.models.reader import reader_of
from slimming.run import SlimmingOptions
from slimming.search.budget import Budget
from slimming.search.distillation import ChosenFit, Distillation, chosen_fit
from slimming.search.request import PlanRequest
from tests.helpers.finetuning import CLASSES, equal, models, state, stop_after
from tests.helpers.forks import run_in_two_processes

ROOT = Path(__file__).parents[2]
RECIPE = Distillation(steps=6, batch_size=16, lr=1e-3)
#: Share of the way learnt by which weights may differ: gradients are added in another order, and of one near zero Adam takes
#: the sign.
ORDER = 0.02


class Smooth:
    """Tensors (3, 48, 48) of a few waves each, of no class."""

    transform = None

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng(index)
        at = np.linspace(0, 3, 48)
        waves = [np.outer(np.sin(at * rng.uniform(1, 6) + rng.uniform(0, 6)), np.cos(at * rng.uniform(1, 6))) for _ in range(3)]
        return torch.tensor(np.stack(waves), dtype=torch.float32), -1


def images(start: int = 0, stop: int = 96) -> ImageSet:
    return ImageSet("smooth", "train", "all", [], Smooth(), list(range(start, stop)))


def repeated(count: int) -> ImageSet:
    """The same few images over and over."""
    return ImageSet("smooth", "train", "all", [], Smooth(), [index % 8 for index in range(count)])


def run(slim: Any, teacher: Any, recipe: Distillation = RECIPE, **more: Any) -> Any:
    return distill(slim, teacher, more.pop("images", None) or images(), None, recipe=recipe, fingerprint="smooth", **more)


@torch.no_grad()
def divergence(slim: Any, teacher: Any) -> float:
    held_out = torch.stack([Smooth()[index][0] for index in range(100, 200)])
    dense, cut = teacher(held_out).log_softmax(-1), slim(held_out).log_softmax(-1)
    return float((dense.exp() * (dense - cut)).sum(-1).mean())


def test_it_comes_closer_on_images_that_it_has_not_seen() -> None:
    slim, teacher = models()
    with torch.no_grad():
        slim.model.head.bias += torch.linspace(-1, 1, CLASSES)
    taught, before, calls = state(teacher), divergence(slim, teacher), []
    progress: Any = lambda *call: calls.append(call)  # noqa: E731
    report = run(slim, teacher, Distillation(steps=60, batch_size=32, lr=3e-3), progress=progress)
    assert divergence(slim, teacher) < 0.2 * before
    assert equal(state(teacher), taught)
    assert calls == [("distilling", step, 60) for step in range(61)]
    assert (report.steps, report.images) == (60, 1920)


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole, teacher = models(proj_drop_rate=0.1)
    expected = run(whole, teacher)
    slim, teacher = models(proj_drop_rate=0.1)
    with pytest.raises(KeyboardInterrupt):
        run(slim, teacher, checkpoint=tmp_path, progress=stop_after(3))
    report = run(slim, teacher, checkpoint=tmp_path)
    assert equal(state(slim), state(whole))
    assert (report.loss, report.fingerprint) == (expected.loss, expected.fingerprint)
    with pytest.raises(InputRejected, match="is of another run: feed is"):
        distill(models()[0], teacher, images(), None, recipe=RECIPE, fingerprint="others", checkpoint=tmp_path)


def test_the_batches_are_the_same_on_any_number_of_processes() -> None:
    def batches(group: ProcessGroup, start: int = 0) -> list[Tensor]:
        feed = BlendedImages(images(), None, RECIPE, 7, group, torch.device("cpu"))
        return [batch for batch, _ in feed(start, 3)]

    alone = batches(SINGLE_PROCESS)
    shares = [batches(ProcessGroup(rank, 2)) for rank in range(2)]
    assert all(torch.equal(whole, torch.cat(parts)) for whole, parts in zip(alone, zip(*shares, strict=True), strict=True))
    assert torch.equal(batches(SINGLE_PROCESS, 2)[0], alone[2])
    assert not torch.equal(alone[0], alone[1])


def test_images_are_moved_mirrored_and_blended_with_their_neighbour() -> None:
    flat = torch.arange(64, dtype=torch.float32).view(64, 1, 1, 1).expand(64, 3, 16, 16)

    class Flat:
        transform = None

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return flat[index], 0

    given = ImageSet("flat", "train", "all", [], Flat(), list(range(64)))
    ((batch, classes),) = BlendedImages(given, None, RECIPE, 0, SINGLE_PROCESS, torch.device("cpu"))(0, 1)
    assert batch.shape == (16, 3, 16, 16)
    assert not classes.any()
    values = batch[:, 0, 0, 0]
    assert torch.allclose(batch, values.view(16, 1, 1, 1).expand_as(batch))  # a flat image stays flat when moved
    assert len(set(values.tolist())) == 16
    assert sum(float(value) % 1 > 1e-3 for value in values) > 12  # whole numbers are what no blend gives


def together(folder: Path) -> None:
    """What each of two processes does."""
    slim, teacher = models()
    group = ProcessGroup(int(os.environ["RANK"]), 2)
    report = run(slim, teacher, process_group=group)
    torch.save(slim.state_dict(), folder / f"rank-{group.rank}.pt")
    (folder / f"rank-{group.rank}.json").write_text(json.dumps(report.as_dict()), encoding="utf-8")
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    run_in_two_processes(together, tmp_path)
    slim, teacher = models()
    report = run(slim, teacher)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, second)
    alone, start = state(slim), state(models()[0])
    apart, way = (torch.cat([(first[name] - other[name]).flatten() for name in other]).norm() for other in (alone, start))
    assert apart < ORDER * way
    told = json.loads((tmp_path / "rank-0.json").read_text(encoding="utf-8"))
    assert (told["steps"], told["images"]) == (report.steps, report.images) == (6, 96)
    assert told["loss"] == pytest.approx(report.loss, rel=1e-3)


@pytest.mark.parametrize(
    ("macs", "count", "on_gpu", "fit", "reason"),
    [
        (10**6, 1023, True, "closed-form", "1023 calibration images, and distilling wants 1,024"),
        (10**12, 1024, True, "distill", "1024 calibration images and a GPU"),
        (111_283_456, 1024, False, "distill", "1024 calibration images, and about 9 minutes of a core"),
        (
            1_253_000_000,
            4096,
            False,
            "closed-form",
            "distilling would take a core about 107 minutes, and auto spends 15 at most",
        ),
    ],
)
def test_auto_distils_where_images_and_time_allow(macs: int, count: int, on_gpu: bool, fit: Fit, reason: str) -> None:
    assert chosen_fit(Distillation(), macs=macs, images=count, on_gpu=on_gpu) == ChosenFit(fit, reason)


def test_auto_is_the_fit_that_it_says() -> None:
    _, teacher = models()
    request = PlanRequest(Budget("macs-reduction", 0.4), fit="auto", distillation=Distillation(steps=1, batch_size=16))
    for count, fit, finetuned in ((1024, "distill", True), (64, "closed-form", False)):
        settings = FinderSettings(magnitudes=False)
        with PlanFinder(reader_of(teacher), repeated(count), name="vit", transform=None, settings=settings) as finder:
            found = finder.find_plan(request)
            same = finder.find_plan(replace(request, fit=found.fit))
        assert (found.fit, found.finetune is not None) == (fit, finetuned)
        assert found.fit_reason is not None
        assert found.fit_reason.startswith(f"{count} calibration images")
        assert same.fit_reason is None
        assert equal(state(found.model), state(same.model))


def test_auto_leaves_learning_to_labels_where_there_are_any() -> None:
    assert SlimmingOptions(fit="auto", finetune_epochs=1.0).request().fit == "closed-form"
    assert SlimmingOptions(fit="auto").request().fit == "auto"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"distill_steps": 0}, "--distill-steps 0: must be at least 1"),
        ({"distill_lr": 0.0}, "--distill-lr 0.0: must be above 0"),
        ({"distill_lr": float("nan")}, "--distill-lr nan: must be above 0"),
        ({"finetune_epochs": 1.0}, "--fit distill and --finetune-epochs both train all weights: leave one of them out"),
        ({"calibration_images": 63}, "--calibration-images 63: --fit distill needs at least 64"),
        ({"onnx": Path("model.onnx"), "mean": (0.5,), "std": (0.5,)}, "--fit distill changes weights by PyTorch"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_loaded(given: dict[str, Any], named: str) -> None:
    options: dict[str, Any] = {"fit": "distill", **given}
    with pytest.raises(UsageError, match=named):
        SlimmingOptions(**options).check()


def test_too_few_images_are_refused() -> None:
    with pytest.raises(InputRejected, match="smooth: has 63 calibration images, and --fit distill needs at least 64"):
        run(*models(), images=images(0, 63))


@pytest.mark.slow
def test_a_trained_model_comes_closer_than_by_the_closed_form() -> None:
    """The committed CIFAR-10 model on digits, whose classes it does not have: labels are not looked at."""
    from timm.data import create_transform

    from slimming import SlimViT, calibration_set, evaluation_set, load_model
    from slimming.data.source import load_tensors
    from slimming.models.loading import parse_arguments

    arguments = ("img_size=32", "patch_size=4", "embed_dim=128", "depth=8", "num_heads=4", "num_classes=10")
    weights = str(ROOT / "benchmarks" / "accuracy" / "cifar10_vit.safetensors")
    loaded = load_model("vit_tiny_patch16_224", weights=weights, arguments=parse_arguments(arguments))
    transform = create_transform(**loaded.data_config)
    held_out = torch.cat([batch for batch, _ in load_tensors(evaluation_set("digits", 300), transform, 50)])
    request = PlanRequest(Budget("macs-reduction", 0.6), distillation=Distillation(steps=50, batch_size=64, lr=2e-4))
    found = {}
    with PlanFinder(reader_of(loaded.module), calibration_set("digits", 256), name="vit", transform=transform) as finder:
        fits: tuple[Fit, ...] = ("closed-form", "distill")
        for fit in fits:
            plan = finder.find_plan(replace(request, fit=fit))
            assert plan.fit == fit
            assert (plan.finetune is not None) == (fit == "distill")
            with torch.inference_mode():
                dense, slim = (module(held_out).log_softmax(-1) for module in (loaded.module, SlimViT(plan.model, plan.plan)))
            found[fit] = float((dense.exp() * (dense - slim)).sum(-1).mean())
    assert found["distill"] < 0.95 * found["closed-form"], found
