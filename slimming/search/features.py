"""The dense model's features on the calibration images, which the search, the scores and the errors are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patchslim.choices import Mode
from patchslim.errors import InputRejected
from patchslim.progress import StageProgress
from slimming.distributed import SINGLE_PROCESS, ProcessGroup, batch_slices
from slimming.models.attention import AttentionInput
from slimming.models.vit_reader import VitReader
from slimming.search.scores import input_magnitude
from slimming.search.work import SearchWork
from slimming.tensor_store import DEFAULT_BOUND, TensorStore

#: Images that are looked at together: few, so that attention maps stay in a CPU's caches.
BATCH = 8
#: Images that a score's errors and divergences are measured on, spread over the calibration images.
ERROR_IMAGES = 48
_TINY = 1e-30


@dataclass(frozen=True)
class FeatureSettings:
    """How dense features are made and held.

    ``mode`` is what later blocks see of a dropped token. ``magnitudes``: keep Eq. 6's second factor as well, which the scores
    ``paper`` and ``uniform`` need. ``bound`` is how many bytes of per-image state are held in memory before it spills to disk.
    """

    mode: Mode = "compact"
    magnitudes: bool = True
    bound: int = DEFAULT_BOUND
    process_group: ProcessGroup = SINGLE_PROCESS
    progress: StageProgress | None = None


class DenseFeatures:
    """Z_0 ... Z_L (every block's dense input, the last one's output) of this process's share of the calibration images.

    ``batches`` yields this process's batches of ``BATCH`` images, in order; ``images`` counts those of all processes. Past the
    bound of ``settings`` the features are spilled to disk; attention maps are recomputed, never stored. Raises
    ``InputRejected`` where features are not finite.
    """

    def __init__(
        self,
        reader: VitReader,
        batches: Iterator[Tensor],
        images: int,
        settings: FeatureSettings = FeatureSettings(),
    ) -> None:
        self.reader, self.images, self.mode, self.process_group = reader, images, settings.mode, settings.process_group
        self.store = TensorStore(settings.bound)
        self.device = reader.device
        self.progress: StageProgress = settings.progress or (lambda stage, done, total: None)
        self.work = SearchWork(self.progress)
        self.places = list(batch_slices(images, BATCH))
        self.own = self.process_group.own_batches(len(self.places))
        self.sample = self.spread(ERROR_IMAGES)
        self.everything = list(range(reader.tokens))
        self.features: list[Tensor] = []
        self.magnitudes: list[Tensor] = []
        with torch.inference_mode():
            self.ropes = reader.ropes()
            self._see(batches, settings.magnitudes)
        self.tokens = reader.tokens

    def _see(self, batches: Iterator[Tensor], magnitudes: bool) -> None:
        """Keep, per image, every block boundary's features and, for Eq. 6, ``sum_h ||U_t^h[i, :]||^2``."""
        held = sum(self.places[batch].stop - self.places[batch].start for batch in self.own)
        done, last = 0, len(self.reader.blocks) - 1
        self.progress("dense features", 0, self.images)
        for batch in batches:
            tokens = self.reader.embed(batch.to(self.device))
            if not self.features:
                self.features = [self.store.empty(held, *tokens.shape[1:]) for _ in range(len(self.reader.blocks) + 1)]
                self.magnitudes = [self.store.empty(held, tokens.shape[1]) for _ in self.reader.blocks if magnitudes]
            rows = slice(done, done + len(tokens))
            self.features[0][rows] = tokens.cpu()
            for index, block in enumerate(self.reader.blocks):
                maps: list[Tensor] = []
                rope = self.ropes[index]
                # The last block's are asked for where the head leaves a choice of its tokens.
                asked = magnitudes and (index < last or not self.reader.head.fixed)
                output = block.run(AttentionInput(tokens, tokens, rope, rope, sink=maps if asked else None))
                if asked:
                    found = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
                    self.magnitudes[index][rows] = input_magnitude(found, tokens).cpu()
                tokens = output
                self.features[index + 1][rows] = tokens.cpu()
            if not bool(tokens.isfinite().all()):
                raise InputRejected("the model's features on the calibration images are not finite: are its weights damaged?")
            done += len(tokens)
            self.progress("dense features", min(done * self.process_group.size, self.images), self.images)

    def rows(self, batches: list[int]) -> Iterator[slice]:
        """Yield where this process holds each of its share of ``batches``."""
        for batch in batches:
            if batch % self.process_group.size == self.process_group.rank:
                start = batch // self.process_group.size * BATCH
                yield slice(start, start + self.places[batch].stop - self.places[batch].start)

    def spread(self, images: int) -> list[int]:
        """Return batches of at least ``images`` images, spread over all of them; the same on every process."""
        order = torch.randperm(len(self.places), generator=torch.Generator().manual_seed(0)).tolist()
        return sorted(order[: math.ceil(images / BATCH)])

    @property
    def all_batches(self) -> list[int]:
        """Every batch, whichever process holds it."""
        return list(range(len(self.places)))

    def count(self, batches: list[int]) -> int:
        """Return how many images ``batches`` have, over all processes."""
        return sum(self.places[batch].stop - self.places[batch].start for batch in batches)

    def output(self, block: int, rows: slice) -> Tensor:
        """Return block ``block``'s dense output (b, N, d); -1 is the first block's input."""
        return self.features[block + 1][rows].to(self.device)

    def view(self, block: int, rows: slice, kept: list[int], wanted: list[int]) -> AttentionInput:
        """Return what block ``block`` + 1 is given when ``block`` keeps ``kept`` and the block above ``wanted``."""
        output = self.features[block + 1][rows]
        if self.mode == "compact":
            return self.reader.view(output[:, kept].to(self.device), kept, wanted, self.ropes[block + 1])
        mixed = self.features[block][rows].clone()
        mixed[:, kept] = output[:, kept]
        return self.reader.view(mixed.to(self.device), self.everything, wanted, self.ropes[block + 1])

    @torch.inference_mode()
    def error(self, block: int, kept: list[int], above: list[int]) -> float:
        """Return E of block ``block`` + 1 over its rows ``above`` when ``block`` keeps ``kept``; 0 when it keeps every token.

        E_{l+1} is ||Z^_{l+1} - Z_{l+1}||_F^2 / ||Z_{l+1}||_F^2 averaged over the images of the sample. Above the last block
        stands the head, and its pooled feature takes the rows' place.
        """
        if len(kept) == self.tokens:
            return 0.0
        return self.mean_error(block, lambda view: self.reader.blocks[block + 1].run(view), kept, above)

    def mean_error(self, block: int, run: Callable[[AttentionInput], Tensor], kept: list[int], above: list[int]) -> float:
        """Return ``error`` with what stands above the cut given as ``run``. Raises ``InputRejected`` where it is not finite."""

        def look(rows: slice) -> tuple[Tensor, Tensor]:
            if block == len(self.reader.blocks) - 1:
                output = self.output(block, rows)
                return self.reader.head.pooled(output[:, kept]), self.reader.head.pooled(output[:, above])
            return run(self.view(block, rows, kept, above)), self.output(block + 1, rows)[:, above]

        return self.mean_relative(block, look)

    def mean_relative(
        self, block: int, look: Callable[[slice], tuple[Tensor, Tensor]], batches: list[int] | None = None
    ) -> float:
        """Return the mean of ||result - wanted||_F^2 / ||wanted||_F^2 over ``batches`` (None: the sample); ``look`` gives both.

        Raises ``InputRejected`` where it is not finite; ``block`` is the one that is cut.
        """
        batches = self.sample if batches is None else batches
        found = []
        for rows in self.rows(batches):
            result, wanted = look(rows)
            difference = (result - wanted).square().flatten(1).sum(1).double()
            norm = wanted.square().flatten(1).sum(1).double().clamp_min(_TINY)  # all-zero features have no error
            found.append((difference / norm).sum().cpu())
        total = float(self.process_group.sum_over_batches(found, batches))
        if not math.isfinite(total):
            raise InputRejected(f"the error of block {block + 2} under a cut is not finite: are the weights damaged?")
        return total / self.count(batches)

    def close(self) -> None:
        """Release the features, and what was spilled of them to disk."""
        self.features.clear()
        self.magnitudes.clear()
