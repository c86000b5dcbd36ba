"""Block-wise fitting by gradient descent: E falls, nothing else moves, and a fit that does not help is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from slimming.fitting.block_sgd import FitBatches, fit_block, relative_error
from slimming.models.attention import AttentionInput
from slimming.models.fused_attention import unfused_attention
from slimming.models.reader import ModelReader
from tests.helpers.timm_models import build, images_for

pytestmark = pytest.mark.numeric

BLOCK, KEPT = 1, torch.tensor([0, 1, 2, 5, 7])
IMAGES = [2] * 12  # of each batch: three steps make an epoch


def kept_rows(model: Any, given: Tensor) -> Tensor:
    """The block's kept rows when it reads ``given``."""
    return ModelReader(model).blocks[BLOCK].run(AttentionInput(given, given[:, KEPT]))


@torch.no_grad()
def task(images: int = 24, batch: int = 2) -> tuple[Any, Callable[[Tensor], Tensor], FitBatches, Tensor, Tensor]:
    """A block that reads half of the tokens, and the dense block's output at the rows that it keeps."""
    model = build()
    reader = ModelReader(model)
    tokens = model.blocks[0](reader.embed(images_for(model, images)))
    target = model.blocks[BLOCK](tokens)[:, KEPT]
    inputs = tokens[:, : tokens.shape[1] // 2 + 3]

    def read(numbers: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = list(zip(inputs.split(batch), target.split(batch), strict=True))
        yield from (pairs[number] for number in numbers)

    return model, lambda given: kept_rows(model, given), FitBatches(read, IMAGES), inputs, target


def own(model: Any) -> list[torch.nn.Parameter]:
    return list(model.blocks[BLOCK].parameters())


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_relative_error_is_that_of_the_method() -> None:
    target = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert relative_error(target + torch.tensor([0.0, 1.0]), target).tolist() == pytest.approx([1 / 25, 1 / 4])


def test_the_error_falls_and_only_the_block_moves() -> None:
    model, run, batches, inputs, target = task()
    before = state(model)
    start = float(relative_error(run(inputs), target).mean())
    calls: list[tuple[str, int, int]] = []
    end = fit_block(run, own(model), batches, epochs=12.5, lr=2e-3, progress=lambda *call: calls.append(call))
    assert end < 0.7 * start
    assert end == pytest.approx(float(relative_error(run(inputs), target).mean()), rel=1e-5)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(f"blocks.{BLOCK}.") for name in moved)
    assert calls == [("fitting", step, 38) for step in range(1, 39)]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_a_fit_is_the_same_again() -> None:
    states = []
    for _ in range(2):
        model, run, batches, *_ = task()
        fit_block(run, own(model), batches, epochs=2, lr=1e-3)
        states.append(state(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("lr", [30.0, float("1e30")])
def test_a_fit_that_does_not_help_is_undone(lr: float) -> None:
    model, run, batches, inputs, target = task()
    before = state(model)
    start = float(relative_error(run(inputs), target).mean())
    assert fit_block(run, own(model), batches, epochs=1, lr=lr) == pytest.approx(start, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_interrupted_fit_is_undone() -> None:
    model, run, batches, *_ = task()
    before = state(model)

    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_block(run, own(model), batches, epochs=3, lr=1e-3, progress=interrupt)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_other_trainable_parameters_gather_no_gradient() -> None:
    model, run, batches, *_ = task()
    model.requires_grad_(True)
    only = [model.blocks[BLOCK].mlp.fc2.weight]
    before = state(model)
    fit_block(run, only, batches, epochs=1, lr=1e-3)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == [f"blocks.{BLOCK}.mlp.fc2.weight"]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_features_of_inference_mode_can_be_fitted_on() -> None:
    with torch.inference_mode():
        model, run, batches, inputs, target = task()
        start = float(relative_error(run(inputs), target).mean())
    with torch.no_grad():
        assert inputs.is_inference()
        model = build()  # parameters of its own, not of inference mode
        assert fit_block(lambda given: kept_rows(model, given), own(model), batches, epochs=3, lr=1e-3) < start


def test_unfused_attention_is_for_the_block_only() -> None:
    model = build()
    model.blocks[2].attn.fused_attn = False
    found = [block.attn.fused_attn for block in model.blocks]
    with unfused_attention(model):
        assert not any(block.attn.fused_attn for block in model.blocks)
    assert [block.attn.fused_attn for block in model.blocks] == found


@pytest.mark.parametrize("options", [{"epochs": 0}, {"lr": 0.0}, {"epochs": float("nan")}])
def test_options_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    model, run, batches, *_ = task()
    with pytest.raises(ValueError, match="above 0"):
        fit_block(run, own(model), batches, **options)


def test_no_batches_are_refused() -> None:
    model, run, *_ = task()
    with pytest.raises(ValueError, match="no batches"):
        fit_block(run, own(model), FitBatches(lambda numbers: iter(()), []))
