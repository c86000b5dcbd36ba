"""Label-free reconstruction of a slimmed model: it learns the dense model's answers and features on the calibration images.

A closed-form refit levels off: it changes two projections of a block, one block after the other. Here all weights learn
together, from the answers and from every block's features (``slimming.fitting.feature_targets``), and the images are varied:
moved by up to an eighth of a side over a reflected border, mirrored, and blended pairwise (mixup, Zhang et al., 2018, shares
uniform from 0 to 1). The dense model sees the same varied images, so a blend of two subjects is as good a question as a
picture of one. Related: Beyer et al., "Knowledge distillation: A good teacher is patient and consistent" (2022), whose long
schedules on varied images this shortens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from patchslim.progress import StageProgress
from slimming.data.source import ImageSet, Transform, workers_for
from slimming.distributed import SINGLE_PROCESS, ProcessGroup
from slimming.fitting.finetune import finetune
from slimming.fitting.finetune_data import Draws, read
from slimming.fitting.recipe import FinetuneReport, Recipe
from slimming.search.distillation import Distillation, check_distilled

#: Part of a side that images are moved by, at most.
_MOVED = 8


@dataclass(frozen=True)
class BlendedImages:
    """Batches of varied calibration images, this process's share of each: a ``Feed`` of ``slimming.fitting.finetune``.

    ``transform`` maps a PIL image to the model's input tensor (3, h, w), None where the images are such tensors. Draw i is a
    function of ``(seed, i)`` alone, and is blended with draw i ^ 1: the same batches on any number of processes.
    """

    images: ImageSet
    transform: Transform | None
    recipe: Distillation
    seed: int
    process_group: ProcessGroup
    device: torch.device

    @property
    def share(self) -> int:
        """Images of a batch that this process makes: an even number."""
        return 2 * -(-self.recipe.batch_size // (2 * self.process_group.size))

    def __call__(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of steps ``start`` to ``stop``: images (b, 3, h, w), and zeros for classes that nobody looks at."""
        share, size = self.share, self.share * self.process_group.size
        first = self.process_group.rank * share
        own = [[step * size + first + place for place in range(share)] for step in range(start, stop)]
        draws = Draws(self.images, self._varied, count=stop * size, classes=None, seed=self.seed)
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            draws,  # type: ignore[arg-type]
            batch_sampler=own,
            num_workers=workers_for(len(own) * share, share),
            generator=torch.Generator(),  # else an iterator would take a number from the global one
            pin_memory=self.device.type == "cuda",
        )
        for step, (images, _) in zip(range(start, stop), read(self.images, loader), strict=True):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
            shares = torch.rand(size, 1, 1, 1, generator=generator)[first : first + share]
            partners = images.view(share // 2, 2, *images.shape[1:]).flip(1).flatten(0, 1)
            blended = shares * images + (1 - shares) * partners
            yield blended.to(self.device, non_blocking=True), torch.zeros(share, dtype=torch.long, device=self.device)

    def _varied(self, image: object) -> Tensor:
        pixels: Tensor = image if self.transform is None else self.transform(image)  # type: ignore[assignment, arg-type]
        height, width = pixels.shape[-2:]
        padding = (width // _MOVED, height // _MOVED)
        moved: Tensor = transforms.RandomCrop((height, width), padding=padding, padding_mode="reflect")(pixels)
        if not self.images.mirrored_alike:
            return moved
        mirrored: Tensor = transforms.RandomHorizontalFlip()(moved)
        return mirrored


def distill(
    slim: nn.Module,
    teacher: nn.Module,
    images: ImageSet,
    transform: Transform | None,
    *,
    recipe: Distillation,
    fingerprint: str,
    seed: int = 0,
    process_group: ProcessGroup = SINGLE_PROCESS,
    checkpoint: Path | None = None,
    progress: StageProgress | None = None,
) -> FinetuneReport:
    """Train ``slim`` (a ``SlimViT``) in place towards ``teacher``, the dense original: its answers and features on ``images``.

    ``fingerprint`` tells the preprocessed images from others; with a folder ``checkpoint`` an interrupted run goes on from
    there, as ``finetune`` says. Every process of the group calls it, and each ends with equal weights. ``progress`` is called
    with ("distilling", steps done, steps). Raises ``InputRejected`` for too few images, and as ``finetune``.
    """
    recipe.check()
    check_distilled(images.address, len(images))
    feed = BlendedImages(images, transform, recipe, seed, process_group, next(slim.parameters()).device)

    def report(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress("distilling", done, total)

    return finetune(
        slim,
        teacher,
        images,
        data_config={},
        recipe=Recipe(
            epochs=recipe.steps * feed.share * process_group.size / len(images),
            batch_size=feed.share,
            lr=recipe.lr,
            label_smoothing=0.0,
            distill=1.0,
            features=recipe.features,
            precision=recipe.precision,
            seed=seed,
        ),
        checkpoint=checkpoint,
        feed=feed,
        feed_identity=f"varied and blended, {fingerprint}",
        progress=report,
    )
