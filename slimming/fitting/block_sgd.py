"""Algorithm 1's block-wise fitting by gradient descent: block l's own parameters, original features in, E_{l+1} as the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from patchslim.progress import StageProgress
from slimming.distributed import SINGLE_PROCESS, ProcessGroup
from slimming.models.attention import AttentionInput
from slimming.models.fused_attention import unfused_attention
from slimming.models.reader import ModelReader
from slimming.search.features import DenseFeatures


@dataclass(frozen=True)
class FitBatches:
    """What a block is fitted on.

    ``read`` yields (inputs (b, n, d), targets (b, rows, d)) of this process's share of the batches with the given numbers, in
    their order; ``images`` says how many images each batch has, over all processes.
    """

    read: Callable[[list[int]], Iterator[tuple[Tensor, Tensor]]]
    images: Sequence[int]
    process_group: ProcessGroup = SINGLE_PROCESS


#: Batches whose gradients make one step: that many processes can share it.
STEP_BATCHES = 4
#: Measured on two blocks of ViT-Ti, 32 images a step: E falls from .0116 to .0113, .0109 and .0105 at 2e-4, 4e-4 and 8e-4 in
#: block 5, from .0030 to .0026, .0024 and .0024 in block 10, after 3 epochs of 256 images; the middle, to be safe elsewhere.
LR = 4e-4
_TINY = 1e-30  # an image whose target is all zero has no relative error


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Return E of each image, ||output - target||_F^2 / ||target||_F^2, of two (b, rows, d): (b,) in float32."""
    difference = (output.float() - target.float()).square().flatten(1).sum(1)
    return difference / target.float().square().flatten(1).sum(1).clamp_min(_TINY)


def fit_block(
    block_run: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    batches: FitBatches,
    *,
    epochs: float = 3,
    lr: float = LR,
    progress: StageProgress | None = None,
) -> float:
    """Minimise a slimmed block's mean relative error E over ``parameters`` alone; returns the E that it ends at.

    ``block_run`` maps inputs (b, n, d) to the block's output at its kept rows (b, rows, d). Gradients are added in the order of
    the batches, so that several processes learn what one would. ``epochs`` counts passes (3 in the paper; may be fractional).
    The paper names no optimiser for this step: AdamW without weight decay, since the block is to stay near the dense one,
    cosine to zero and gradients clipped to norm 1; ``STEP_BATCHES`` batches a step. E is measured before and after;
    parameters that did not lower it are put back, and the first E is returned. ``progress`` is called with ("fitting", steps
    done, steps). On a CPU run it under ``unfused_attention``. Raises ``ValueError`` for no batches, or epochs or a learning
    rate not above 0.
    """
    if not (epochs > 0 and lr > 0):
        raise ValueError(f"epochs {epochs} and lr {lr} must be above 0")
    if not batches.images:
        raise ValueError("no batches to fit a block on")
    own = list(parameters)
    required = [parameter.requires_grad for parameter in own]
    before = [parameter.detach().clone() for parameter in own]
    end = start = _measure(block_run, batches)
    descent = _Descent(block_run, own, batches)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for parameter in own:
                parameter.requires_grad_(True)
            descent.run(epochs, lr, progress or (lambda stage, done, total: None))
        end = _measure(block_run, batches)
    finally:
        with torch.no_grad():
            for parameter, found, flag in zip(own, before, required, strict=True):
                parameter.grad = None
                parameter.requires_grad_(flag)
                if not end < start:  # also where E is not a number, and after an interruption
                    parameter.copy_(found)
    return end if end < start else start


@dataclass(frozen=True)
class _Descent:
    block_run: Callable[[Tensor], Tensor]
    own: list[nn.Parameter]
    batches: FitBatches

    def run(self, epochs: float, lr: float, progress: StageProgress) -> None:
        numbers = range(len(self.batches.images))
        groups = [list(numbers[start : start + STEP_BATCHES]) for start in numbers[::STEP_BATCHES]]
        steps = max(1, round(epochs * len(groups)))
        optimizer = torch.optim.AdamW(self.own, lr=lr, weight_decay=0.0)
        scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=steps, step_on_epochs=False, updates_per_epoch=1)
        for step, group in enumerate(islice(cycle(groups), steps), start=1):
            total = self.batches.process_group.sum_over_batches(list(self._gradients(group)), group)
            mean = total / sum(self.batches.images[number] for number in group)
            parts = torch.split(mean, [parameter.numel() for parameter in self.own])
            for parameter, part in zip(self.own, parts, strict=True):
                parameter.grad = part.to(parameter).view_as(parameter)
            nn.utils.clip_grad_norm_(self.own, 1.0)
            optimizer.step()
            scheduler.step_update(step)
            progress("fitting", step, steps)

    def _gradients(self, group: list[int]) -> Iterator[Tensor]:
        """Of each of this process's batches the gradient of its images' errors, added up: one float64 vector."""
        for inputs, target in self.batches.read(group):
            error = relative_error(self.block_run(_plain(inputs)), _plain(target)).sum()
            # Not backward(): parameters of others must not gather gradients.
            found = torch.autograd.grad(error, self.own, allow_unused=True, materialize_grads=True)
            yield torch.cat([gradient.reshape(-1).double() for gradient in found])


@torch.no_grad()
def _measure(block_run: Callable[[Tensor], Tensor], batches: FitBatches) -> float:
    """Mean E over all images."""
    every = list(range(len(batches.images)))
    found = [relative_error(block_run(inputs), target).double().sum() for inputs, target in batches.read(every)]
    return float(batches.process_group.sum_over_batches(found, every)) / sum(batches.images)


def _plain(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy that autograd may save where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


#: The paper's epochs of fitting per step.
EPOCHS = 3.0


class BlockFitter:
    """Fits one block after the other, from the top, on a copy of the model; what it learns is in ``model``.

    Calling it with (block, kept, above) starts that block at its dense weights again, fits it, and gives E of the block above,
    whose own fit is already in place. A block that keeps every token stays at its dense weights, without error.
    """

    def __init__(
        self,
        features: DenseFeatures,
        *,
        epochs: float = EPOCHS,
        lr: float = LR,
        progress: StageProgress | None = None,
    ) -> None:
        self.features, self.epochs, self.lr = features, epochs, lr
        self.dense = ModelReader(features.reader.model)
        self.model: nn.Module = copy.deepcopy(features.reader.model)
        self.reader = ModelReader(self.model)
        self.progress = progress
        with torch.inference_mode(False):  # autograd saves the rotary tables
            self.ropes = [None if rope is None else rope.clone() for rope in features.ropes]

    def __call__(self, block: int, kept: list[int], above: list[int]) -> float:
        """E of block ``block`` + 1 at its rows ``above`` after ``block``, keeping ``kept``, was fitted."""
        features, reader = self.features, self.reader
        module = reader.blocks[block].module
        module.load_state_dict(self.dense.blocks[block].module.state_dict())
        if len(kept) == features.tokens:
            return 0.0
        with torch.inference_mode(False):  # autograd saves it
            positions = torch.tensor(kept, device=features.device)

        def run(tokens: Tensor) -> Tensor:
            rope = self.ropes[block]
            output = reader.blocks[block].run(reader.view(tokens, features.everything, kept, rope))
            rope = self.ropes[block + 1]
            if features.mode == "stale":
                view: AttentionInput = reader.view(tokens.index_copy(1, positions, output), features.everything, above, rope)
            else:
                view = reader.view(output, kept, above, rope)
            return reader.blocks[block + 1].run(view)

        def read(numbers: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
            for rows in features.rows(numbers):
                yield features.output(block - 1, rows), features.output(block + 1, rows)[:, above]

        batches = FitBatches(read, [features.count([number]) for number in features.all_batches], features.process_group)
        with unfused_attention(self.model):
            return fit_block(run, module.parameters(), batches, epochs=self.epochs, lr=self.lr, progress=self.progress)
