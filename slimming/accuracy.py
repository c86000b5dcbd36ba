"""Top-1 of models on labelled images, shared out over processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from patchslim.intervals import drop_interval, proportion_interval
from patchslim.progress import StageProgress
from slimming.data.source import ImageSet, Transform, load_tensors
from slimming.distributed import SINGLE_PROCESS, ProcessGroup, batch_slices

BATCH = 8


@dataclass(frozen=True)
class Accuracy:
    """Images answered right, and as the first model answers; of those that only one of the two has right, how many each."""

    images: int
    right: int
    agreeing: int
    lost: int  # right in the first model alone
    gained: int  # right in this one alone

    @property
    def top1(self) -> float:
        """Percent of images answered right."""
        return 100 * self.right / self.images

    @property
    def agreement(self) -> float:
        """Percent of images answered as the first model answers."""
        return 100 * self.agreeing / self.images

    @property
    def drop_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the top-1 lost against the first model, points."""
        return drop_interval(self.lost, self.gained, self.images)

    @property
    def agreement_interval(self) -> tuple[float, float]:
        """95 % confidence interval of ``agreement``, percent."""
        return proportion_interval(self.agreeing, self.images)


@torch.inference_mode()
def evaluate(
    models: Sequence[nn.Module],
    images: ImageSet,
    transform: Transform | None,
    *,
    process_group: ProcessGroup = SINGLE_PROCESS,
    progress: StageProgress | None = None,
) -> list[Accuracy]:
    """Return every model's accuracy on the same ``images``; the first one is what the others are compared with."""
    places = list(batch_slices(len(images), BATCH))
    own = [index for batch in process_group.own_batches(len(places)) for index in images.indices[places[batch]]]
    device = next(models[0].parameters()).device
    counted = torch.zeros(len(models), 4, dtype=torch.float64)
    done = 0
    if progress:
        progress("measuring", 0, len(images))
    for batch, targets in load_tensors(dataclasses.replace(images, indices=own), transform, BATCH) if own else ():
        answers = [model(batch.to(device)).argmax(1).cpu() for model in models]
        was_right = answers[0] == targets
        for index, answer in enumerate(answers):
            right = answer == targets
            counts = (right, answer == answers[0], was_right & ~right, right & ~was_right)
            counted[index] += torch.tensor([int(each.sum()) for each in counts])
        done += len(batch)
        if progress:
            progress("measuring", min(done * process_group.size, len(images)), len(images))
    summed = process_group.all_reduce_sum(counted)
    return [Accuracy(len(images), *(int(count) for count in row)) for row in summed]
