"""Fine-tuning a slimmed model: it learns, it can be interrupted and resumed to the bit, and leaves what it found."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.nn import functional

from patchslim.errors import InputRejected, UsageError
from patchslim.files import digest
from slimming.fitting import finetune_checkpoint as finetune_state
from slimming.fitting.finetune_data import Draws, train_transform
from slimming.fitting.recipe import Recipe
from slimming.models.weights import state_digest
from tests.helpers.finetuning import CLASSES, DATA_CONFIG, IMAGES, RECIPE, equal, images, models, run, state, stop_after
from tests.helpers.forks import run_in_two_processes
from tests.helpers.timm_models import KINDS, build, images_for


@pytest.mark.parametrize(
    ("kind", "mode", "epochs"),
    [
        ("distilled", "stale", 12),
        *(
            pytest.param(kind, mode, 20, marks=pytest.mark.slow)
            for kind, mode in (("distilled", "stale"), ("class_token", "compact"), ("registers", "compact"))
        ),
    ],
)
def test_it_learns_the_labels_and_leaves_the_teacher_alone(kind: str, mode: Any, epochs: int) -> None:
    slim, teacher = models(kind, mode)
    before, taught = state(slim), state(teacher)
    calls: list[tuple[str, int, int]] = []
    recipe, steps = Recipe(epochs=epochs, batch_size=8, lr=3e-3, distill=0.1), epochs * IMAGES // 8
    report = run(slim, teacher, recipe, progress=lambda *call: calls.append(call))
    given = images()
    given.samples.transform = train_transform(DATA_CONFIG, hflip=0.0)
    with torch.no_grad():
        right = [int(slim(given.samples[index][0][None]).argmax()) == given.samples[index][1] for index in range(IMAGES)]
    assert sum(right) > 0.7 * IMAGES
    assert not equal(state(slim), before)
    assert equal(state(teacher), taught)
    assert calls == [("fine-tuning", step, steps) for step in range(steps + 1)]
    assert (report.steps, report.images, report.epochs, report.lr) == (steps, 8 * steps, float(epochs), 3e-3)
    assert 0 < report.loss < 5
    assert json.loads(json.dumps(report.as_dict()))["fingerprint"] == report.fingerprint


def test_distillation_alone_needs_no_true_labels() -> None:
    losses = []
    for epochs in (0.2, 10):
        slim, teacher = models()
        with torch.no_grad():
            slim.model.head.bias += torch.linspace(-1, 1, CLASSES)
        losses.append(run(slim, teacher, Recipe(epochs=epochs, batch_size=8, lr=3e-3, distill=1.0)).loss)
    assert losses[1] < 0.5 * losses[0]


def test_what_it_touches_is_put_back() -> None:
    slim, teacher = models()
    slim.model.head.requires_grad_(True)
    slim.train()
    slim.model.blocks[1].eval()
    slim.model.blocks[2].attn.fused_attn = False
    given = images()
    given.samples.transform = marker = object()

    def found() -> Any:
        return (
            [parameter.requires_grad for top in (slim, teacher) for parameter in top.parameters()],
            [module.training for top in (slim, teacher) for module in top.modules()],
            [block.attn.fused_attn for block in slim.model.blocks],
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            sorted(slim.__dict__),
        )

    before = found()
    run(slim, teacher, replace(RECIPE, precision="bf16"), images=given)
    assert found() == before
    assert given.samples.transform is marker
    assert all(parameter.grad is None for parameter in slim.parameters())
    with pytest.raises(KeyboardInterrupt):
        run(slim, teacher, replace(RECIPE, precision="bf16"), images=given, progress=stop_after(2))
    assert found() == before


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind: str, mode: Any) -> None:
    """Several processes wait for one of each; a parameter without would stop them all."""
    slim, _ = models(kind, mode)
    slim.requires_grad_(True)
    slim(images_for(slim.model, 2)).square().sum().backward()
    assert not [name for name, parameter in slim.named_parameters() if parameter.grad is None]


def test_mixed_precision_trains_and_the_weights_stay_float32() -> None:
    slim, teacher = models()
    before = state(slim)
    run(slim, teacher, replace(RECIPE, precision="bf16"))
    exact, _ = models()
    run(exact, teacher)
    assert {value.dtype for value in slim.state_dict().values()} == {torch.float32}
    assert not equal(state(slim), state(exact))
    moved = torch.cat([(state(exact)[name] - before[name]).flatten() for name in before])
    other = torch.cat([(state(slim)[name] - before[name]).flatten() for name in before])
    assert torch.cosine_similarity(moved, other, 0) > 0.8


def test_a_seed_decides_everything() -> None:
    results = []
    for seed in (0, 0, 1):
        slim, teacher = models(proj_drop_rate=0.1)
        torch.manual_seed(len(results))  # what the caller did with the generators is of no account
        run(slim, teacher, replace(RECIPE, seed=seed))
        results.append(state(slim))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


@pytest.mark.parametrize("steps", [3, 11])
def test_an_interrupted_run_ends_as_one_that_was_not(steps: int, tmp_path: Path) -> None:
    whole, teacher = models(proj_drop_rate=0.1)
    expected = run(whole, teacher, checkpoint=tmp_path / "whole", checkpoint_steps=2)
    slim, teacher = models(proj_drop_rate=0.1)
    start = state(slim)
    folder = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        run(slim, teacher, checkpoint=folder, checkpoint_steps=2, progress=stop_after(steps))
    assert equal(state(slim), start)
    assert [path.name for path in folder.iterdir()] == [f"step-{steps - 1}"]
    torch.manual_seed(123)
    calls: list[int] = []
    report = run(slim, teacher, checkpoint=folder, checkpoint_steps=2, progress=lambda _, done, total: calls.append(done))
    assert calls == list(range(steps - 1, 13))
    assert equal(state(slim), state(whole))
    assert (report.loss, report.fingerprint) == (expected.loss, expected.fingerprint)


def test_a_finished_run_is_taken_as_it_is(tmp_path: Path) -> None:
    slim, teacher = models()
    run(slim, teacher, checkpoint=tmp_path)
    again, teacher = models()
    calls: list[int] = []
    run(again, teacher, checkpoint=tmp_path, progress=lambda _, done, total: calls.append(done))
    assert not calls
    assert equal(state(again), state(slim))


def test_a_crash_half_way_through_a_save_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, teacher = models()
    run(whole, teacher)
    slim, teacher = models()
    text = Path.write_text

    def full_disk(self: Path, *arguments: Any, **options: Any) -> int:
        if self.parent.name == ".step-8.part":
            raise OSError(28, "No space left on device")
        return text(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="No space"):
            run(slim, teacher, checkpoint=tmp_path, checkpoint_steps=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-8.part", "step-4"]
    calls: list[int] = []
    run(slim, teacher, checkpoint=tmp_path, checkpoint_steps=4, progress=lambda _, done, total: calls.append(done))
    assert calls[:2] == [4, 5]
    assert equal(state(slim), state(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["step-12"]


def test_two_whole_checkpoints_resume_from_the_newer(tmp_path: Path) -> None:
    for name in ("step-9", "step-10", "step-x", "notes"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in finetune_state._saved(tmp_path)] == [9, 10]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": replace(RECIPE, lr=2e-3)}, "recipe.lr is 0.001 there and 0.002 here"),
        ({"recipe": replace(RECIPE, epochs=3)}, "recipe.epochs is 2.5 there and 3 here"),
        ({"images": images(39)}, "images.images is 40 there and 39 here"),
        ({"images": images(classes=6)}, "images.fingerprint is "),
        ({"mode": "stale"}, "plan.stale is false there and true here"),
        ({"teacher": True}, "teacher is "),
        ({"weights": True}, "weights is "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    slim, teacher = models()
    with pytest.raises(KeyboardInterrupt):
        run(slim, teacher, checkpoint=tmp_path, checkpoint_steps=1, progress=stop_after(1))
    slim, teacher = models(mode=change.get("mode", "compact"))
    with torch.no_grad():
        for wanted, module in (("teacher", teacher), ("weights", slim.model)):
            if change.get(wanted):
                module.head.bias += 1
    options = {key: value for key, value in change.items() if key in ("recipe", "images")}
    with pytest.raises(InputRejected, match="another run") as refused:
        run(slim, teacher, checkpoint=tmp_path, **options)
    assert named in str(refused.value)
    assert (tmp_path / "step-1").is_dir()


class Intruder:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_nothing_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    """A folder whose digests are right, as one who means harm leaves it."""
    slim, teacher = models()
    folder, trace = tmp_path / "run", tmp_path / "trace"
    with pytest.raises(KeyboardInterrupt):
        run(slim, teacher, checkpoint=folder, checkpoint_steps=1, progress=stop_after(1))
    step = folder / "step-1"
    assert not list(step.glob("custom_checkpoint*"))  # which Accelerate would read by any pickle
    digests = json.loads((step / "digests.json").read_text(encoding="utf-8"))
    for name in ("states.pt", "optimizer.bin"):
        kept = (step / name).read_bytes()
        torch.save({"average": Intruder(trace)}, step / name)
        changed = digests | {name: digest(step / name)}
        (step / "digests.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(InputRejected, match="a damaged checkpoint"):
            run(slim, teacher, checkpoint=folder)
        assert not trace.exists()
        (step / name).write_bytes(kept)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    slim, teacher = models()
    with pytest.raises(KeyboardInterrupt):
        run(slim, teacher, checkpoint=tmp_path, checkpoint_steps=1, progress=stop_after(1))
    before = state(slim)
    step = tmp_path / "step-1"
    for name in ("random_states_0.pkl", "optimizer.bin", "states.pt", "model.safetensors"):
        kept = (step / name).read_bytes()
        (step / name).write_bytes(kept[:-1])
        with pytest.raises(InputRejected, match=f"a damaged checkpoint: {name} is not as it was written"):
            run(slim, teacher, checkpoint=tmp_path)
        (step / name).write_bytes(kept)
    (step / "states.pt").unlink()
    with pytest.raises(InputRejected, match=r"a damaged checkpoint: states.pt"):
        run(slim, teacher, checkpoint=tmp_path)
    (step / "digests.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputRejected, match="cannot be read as a checkpoint"):
        run(slim, teacher, checkpoint=tmp_path)
    assert equal(state(slim), before)
    (tmp_path / "step-1" / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputRejected, match="cannot be read as a checkpoint"):
        run(slim, teacher, checkpoint=tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputRejected, match="not a folder of checkpoints"):
        run(slim, teacher, checkpoint=tmp_path / "file")


def test_a_run_that_diverges_is_refused_and_undone() -> None:
    slim, teacher = models()
    before = state(slim)
    with pytest.raises(UsageError, match="diverged"):
        run(slim, teacher, replace(RECIPE, lr=1e30))
    assert equal(state(slim), before)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 0}, "epochs 0"),
        ({"lr": float("nan")}, "lr nan"),
        ({"distill": 1.5}, "distill 1.5"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"batch_size": 7}, "batch_size 7 is odd"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named.replace("(", r"\(")):
        run(*models(), replace(RECIPE, **change))


def test_the_learning_rate_grows_with_the_total_batch() -> None:
    assert Recipe().learning_rate(512) == pytest.approx(2e-4)
    assert Recipe().learning_rate(64) == pytest.approx(2.5e-5)
    assert Recipe(lr=0.1).learning_rate(64) == 0.1


def test_images_and_teachers_that_do_not_fit_are_refused() -> None:
    slim, teacher = models()
    with pytest.raises(InputRejected, match="deep copy"):
        run(slim, slim.model)
    with pytest.raises(InputRejected, match="the teacher gives logits"):
        run(slim, build(num_classes=9))
    with pytest.raises(InputRejected, match="no images"):
        run(slim, teacher, images=images(0))
    with pytest.raises(InputRejected, match="of class 7, and the model knows 7 classes"):
        run(slim, teacher, images=images(classes=9))


def test_draws_cover_every_image_once_an_epoch_in_new_orders() -> None:
    draws = Draws(images(), None, count=100, classes=CLASSES, seed=0)
    order = [draws.index_of(draw) for draw in range(100)]
    assert sorted(order[:40]) == sorted(order[40:80]) == list(range(40))
    assert order[:40] != order[40:80]
    assert [draws.index_of(draw) for draw in (99, 0, 57)] == [order[99], order[0], order[57]]


def test_a_draw_is_the_same_whatever_was_drawn_before() -> None:
    draws = Draws(images(), train_transform(DATA_CONFIG, hflip=0.5), count=100, classes=CLASSES, seed=0)
    first = draws[57]
    draws[3]
    torch.rand(5)
    again = draws[57]
    assert torch.equal(first[0], again[0])
    other = next(draw for draw in range(40, 80) if draw != 57 and draws.index_of(draw - 40) == draws.index_of(57))
    assert not torch.equal(draws[other - 40][0], first[0])  # the same image in another epoch is cropped anew


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("side", [(48, 64), (96, 96)])
def test_images_are_those_of_evaluation_moved_by_an_eighth_and_mirrored(side: tuple[int, int], crop_mode: str) -> None:
    config = {**DATA_CONFIG, "input_size": (3, *side), "crop_mode": crop_mode}
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    image, evaluated = Image.fromarray(pixels), create_transform(**config)(Image.fromarray(pixels))
    down, right = side[0] // 8, side[1] // 8
    bordered = functional.pad(evaluated[None], (right, right, down, down), mode="reflect")[0]
    places = {}
    for hflip in (0.0, 1.0):
        transform = train_transform(config, hflip=hflip)
        torch.manual_seed(0)
        for _ in range(8):
            drawn = transform(image)
            drawn = drawn.flip(-1) if hflip else drawn
            windows = bordered.unfold(1, side[0], 1).unfold(2, side[1], 1).permute(1, 2, 0, 3, 4)
            found = [(y, x) for y in range(2 * down + 1) for x in range(2 * right + 1) if torch.equal(windows[y, x], drawn)]
            assert len(found) == 1
            places[found[0]] = hflip
    assert len(places) > 8  # of 16 draws


def finetune_together(folder: Path) -> None:
    """What each of two processes does."""
    slim, teacher = models(proj_drop_rate=0.1)
    calls: list[tuple[str, int, int]] = []
    options = {"checkpoint": folder / "checkpoints", "checkpoint_steps": 2}
    report = run(slim, teacher, progress=lambda *call: calls.append(call), **options)
    answer = {"weights": state_digest(slim.state_dict()), "calls": calls, "report": report.as_dict()}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(answer), encoding="utf-8")
    torch.distributed.destroy_process_group()


def test_two_processes_share_a_run(tmp_path: Path) -> None:
    run_in_two_processes(finetune_together, tmp_path)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert first["weights"] == second["weights"]
    assert first["report"]["images"] == 96  # 6 steps of 2 x 8
    assert first["report"]["loss"] == second["report"]["loss"]
    assert first["calls"] == [["fine-tuning", step, 6] for step in range(7)]
    assert second["calls"] == []
    saved = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert saved == ["step-6"]
    assert json.loads((tmp_path / "checkpoints" / "step-6" / "run.json").read_text(encoding="utf-8"))["processes"] == 2
