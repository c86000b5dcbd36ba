"""Algorithm 1's block-wise fitting by gradient descent: one block's own parameters, against the dense block's output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]
Progress = Callable[[str, int, int], None]

_TINY = 1e-30  # an image whose target is all zero has no relative error


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """E of METHOD.md for each image: ||output - target||_F^2 / ||target||_F^2; (b, rows, d) twice -> (b,), float32."""
    difference = (output.float() - target.float()).square().flatten(1).sum(1)
    return difference / target.float().square().flatten(1).sum(1).clamp_min(_TINY)


@contextlib.contextmanager
def unfused_attention(module: nn.Module) -> Iterator[None]:
    """timm's attentions under ``module`` by plain products for the block: on a CPU, fused attention's backward is slower."""
    fused = [(part, part.fused_attn) for part in module.modules() if hasattr(part, "fused_attn")]
    try:
        for part, _ in fused:
            part.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for part, found in fused:
            part.fused_attn = found


def fit_block(
    block_run: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    batches: Batches,
    *,
    epochs: float = 3,
    lr: float = 1e-4,
    progress: Progress | None = None,
) -> float:
    """Minimise a slimmed block's mean relative error E over ``parameters`` alone; returns the E that it ends at.

    ``block_run`` maps inputs (b, n, d) to the block's output at its kept rows (b, rows, d); ``batches`` starts a new pass over
    (inputs, targets (b, rows, d)), the same batches in the same order each time, and ``epochs`` counts such passes (3 in the
    paper; may be fractional). The paper names no optimiser for this step: AdamW without weight decay, since the block is to
    stay near the dense one, cosine to zero and gradients clipped to norm 1. E is measured before and after; parameters that did
    not lower it are put back, and the first E is returned. ``progress`` is called with ("fitting", steps done, steps). On a
    CPU run it under ``unfused_attention``. Raises ``ValueError`` for no batches, or epochs or a learning rate not above 0.
    """
    if not (epochs > 0 and lr > 0):
        raise ValueError(f"epochs {epochs} and lr {lr} must be above 0")
    own = list(parameters)
    required = [parameter.requires_grad for parameter in own]
    before = [parameter.detach().clone() for parameter in own]
    start, count = _measure(block_run, batches)
    steps = max(1, round(epochs * count))
    end = start
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for parameter in own:
                parameter.requires_grad_(True)
            _descend(block_run, own, batches, steps, lr, progress or (lambda stage, done, total: None))
        end, _ = _measure(block_run, batches)
    finally:
        with torch.no_grad():
            for parameter, found, flag in zip(own, before, required, strict=True):
                parameter.grad = None
                parameter.requires_grad_(flag)
                if not end < start:  # also where E is not a number, and after an interruption
                    parameter.copy_(found)
    return end if end < start else start


def _descend(
    block_run: Callable[[Tensor], Tensor], own: list[nn.Parameter], batches: Batches, steps: int, lr: float, progress: Progress
) -> None:
    optimizer = torch.optim.AdamW(own, lr=lr, weight_decay=0.0)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=steps, step_on_epochs=False, updates_per_epoch=1)
    step = 0
    while step < steps:
        for inputs, target in batches():
            error = relative_error(block_run(_plain(inputs)), _plain(target)).mean()
            # Not backward(): parameters of others must not gather gradients.
            for parameter, gradient in zip(own, torch.autograd.grad(error, own, allow_unused=True), strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            progress("fitting", step, steps)
            if step == steps:
                return


@torch.no_grad()
def _measure(block_run: Callable[[Tensor], Tensor], batches: Batches) -> tuple[float, int]:
    """Mean E over all images, and the number of batches."""
    total, images, count = 0.0, 0, 0
    for inputs, target in batches():
        errors = relative_error(block_run(inputs), target)
        total, images, count = total + float(errors.double().sum()), images + len(errors), count + 1
    if not images:
        raise ValueError("no batches to fit a block on")
    return total / images, count


def _plain(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy that autograd may save where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
