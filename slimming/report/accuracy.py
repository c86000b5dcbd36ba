"""Top-1 of models on labelled images, shared out over processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from patchslim.progress import StageProgress
from slimming.data.source import ImageSet, Transform, load_tensors
from slimming.distributed import SINGLE_PROCESS, ProcessGroup, batch_slices

BATCH = 8


@dataclass(frozen=True)
class Accuracy:
    """Percent of images answered right, and answered as the first model answers."""

    top1: float
    agreement: float


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
    hits = torch.zeros(len(models), 2, dtype=torch.float64)
    done = 0
    for batch, targets in load_tensors(dataclasses.replace(images, indices=own), transform, BATCH) if own else ():
        answers = [model(batch.to(device)).argmax(1).cpu() for model in models]
        for index, answer in enumerate(answers):
            hits[index] += torch.tensor([int((answer == targets).sum()), int((answer == answers[0]).sum())])
        done += len(batch)
        if progress:
            progress("measuring", min(done * process_group.size, len(images)), len(images))
    shares = 100 * process_group.all_reduce_sum(hits) / len(images)
    return [Accuracy(float(top1), float(agreement)) for top1, agreement in shares]
