"""Algorithm 1's fitting at every step: block l's own parameters, original features in, E_{l+1} as the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from slimming.families import ModelReader, View
from slimming.features import DenseFeatures
from slimming.fit_sgd import LR, fit_block, unfused_attention

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
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.features, self.epochs, self.lr = features, epochs, lr
        self.model: Any = copy.deepcopy(features.reader.model)
        self.reader = ModelReader(self.model)
        self.progress = progress
        with torch.inference_mode(False):  # autograd saves the rotary tables
            self.ropes = [None if rope is None else rope.clone() for rope in features.ropes]

    def __call__(self, block: int, kept: list[int], above: list[int]) -> float:
        """E of block ``block`` + 1 at its rows ``above`` after ``block``, keeping ``kept``, was fitted."""
        features, reader = self.features, self.reader
        module = self.model.blocks[block]
        module.load_state_dict(features.reader.model.blocks[block].state_dict())
        if len(kept) == features.tokens:
            return 0.0
        with torch.inference_mode(False):  # autograd saves it
            positions = torch.tensor(kept, device=features.device)

        def run(tokens: Tensor) -> Tensor:
            rope = self.ropes[block]
            output = reader.blocks[block].run(reader.view(tokens, features.everything, kept, rope))
            rope = self.ropes[block + 1]
            if features.mode == "stale":
                view: View = reader.view(tokens.index_copy(1, positions, output), features.everything, above, rope)
            else:
                view = reader.view(output, kept, above, rope)
            return reader.blocks[block + 1].run(view)

        def batches(numbers: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
            for rows in features.rows(numbers):
                yield features.output(block - 1, rows), features.output(block + 1, rows)[:, above]

        images = [features.count([number]) for number in features.all_batches]
        with unfused_attention(self.model):
            return fit_block(
                run,
                module.parameters(),
                batches,
                images,
                epochs=self.epochs,
                lr=self.lr,
                world=features.world,
                progress=self.progress,
            )
