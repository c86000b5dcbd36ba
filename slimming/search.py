"""Top-down selection (Algorithm 1): from the last block down, keep what the blocks above need, by tolerance or MAC budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimming.door import BudgetUnreachable, InputRejected
from slimming.plan import Geometry, Layout, Mode, macs_of
from slimming.scores import PathGram, input_magnitude, paper_score
from slimming.store import DEFAULT_BOUND, TensorStore
from slimming.vit import attention_maps, embed, geometry_of, head_tokens_of, run_block

#: The paper's r': tokens are tried in steps of this many.
STEP = 10
#: Images whose attention maps are in memory at once.
BATCH = 8
#: A budget is first solved on this many images, then met on all of them from there.
PROBE = 32
#: A budget's search ends this close above it (a fraction of the dense MACs), or after this many walks.
CLOSE_ENOUGH = 0.006
PROBE_WALKS, FULL_WALKS = 8, 4
_START, _LEAST = 1e-3, 1e-7  # tolerances to start at and to stop below
_TINY = 1e-30

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Selection:
    """A found plan: the tokens of every block, the error that each cut causes, and the tolerance that led to it."""

    kept: list[list[int]]
    errors: list[float]  # E of the block above each cut; 0 for the last block, whose cut is exact
    tolerance: float


class TopDownSearch:
    """Algorithm 1 on the dense features of a model over calibration images.

    The features of every block boundary are computed once; each search walks the blocks from the last to the first and carries
    the path Gram along. E_{l+1} is ||Z^_{l+1} - Z_{l+1}||_F^2 / ||Z_{l+1}||_F^2 over the rows that block l+1 keeps, averaged
    over the images. Per-image state past ``bound`` bytes is spilled to disk; attention maps are recomputed, never stored.
    """

    def __init__(
        self,
        model: Any,
        batches: Iterator[Tensor],
        images: int,
        *,
        mode: Mode = "compact",
        layout: Layout = "split",
        step: int = STEP,
        bound: int = DEFAULT_BOUND,
        progress: Progress | None = None,
    ) -> None:
        self.blocks = list(model.blocks)
        self.mode: Mode = mode
        self.layout: Layout = layout
        self.step = step
        self.prefix = int(model.num_prefix_tokens)
        self.head = head_tokens_of(model)
        self.geometry: Geometry = geometry_of(model)
        self.store = TensorStore(bound)
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self.device = next(model.parameters()).device
        self._errors: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], float] = {}
        self._hints: dict[int, int] = {}
        self.features: list[Tensor] = []
        self.magnitudes: list[Tensor] = []
        self._see(model, batches, images)
        self.images = images
        self.tokens = self.features[0].shape[1]

    @torch.inference_mode()
    def _see(self, model: Any, batches: Iterator[Tensor], images: int) -> None:
        """Keep, per image, Z_0 ... Z_L (every block's dense input, the last one's output) and ``sum_h ||U_t^h[i, :]||^2``."""
        done = 0
        for batch in batches:
            tokens = embed(model, batch.to(self.device))
            if not self.features:
                self.features = [self.store.empty(images, *tokens.shape[1:]) for _ in range(len(self.blocks) + 1)]
                self.magnitudes = [self.store.empty(images, tokens.shape[1]) for _ in self.blocks]
            rows = slice(done, done + len(tokens))
            self.features[0][rows] = tokens.cpu()
            for index, block in enumerate(self.blocks):
                if index < len(self.blocks) - 1:  # the last block's tokens are not scored
                    self.magnitudes[index][rows] = input_magnitude(attention_maps(block, tokens), tokens).cpu()
                tokens = run_block(block, tokens)
                self.features[index + 1][rows] = tokens.cpu()
            if not bool(tokens.isfinite().all()):
                raise InputRejected("the model's features on the calibration images are not finite: are its weights damaged?")
            done += len(tokens)
            self.progress("dense features", done, images)

    def _batches(self) -> Iterator[slice]:
        for start in range(0, self.images, BATCH):
            yield slice(start, min(start + BATCH, self.images))

    def _read(self, block: int, rows: slice, kept: list[int]) -> Tensor:
        """What block ``block`` + 1 may read of ``block``'s output when ``kept`` are its only updated tokens: (b, n, d)."""
        output = self.features[block + 1][rows]
        if self.mode == "compact":
            return output[:, kept].to(self.device)
        mixed = self.features[block][rows].clone()
        mixed[:, kept] = output[:, kept]
        return mixed.to(self.device)

    def _positions(self, wanted: list[int], present: list[int]) -> Tensor:
        """Where ``wanted`` tokens stand in what a block reads: among ``present`` in compact form, everywhere in stale form."""
        if self.mode == "stale":
            return torch.tensor(wanted, device=self.device)
        place = {token: position for position, token in enumerate(present)}
        return torch.tensor([place[token] for token in wanted], device=self.device)

    @torch.inference_mode()
    def error(self, block: int, kept: list[int], above: list[int]) -> float:
        """E of block ``block`` + 1 over its rows ``above`` when ``block`` keeps ``kept``; 0 when it keeps every token."""
        if len(kept) == self.tokens:
            return 0.0
        key = (self.images, block, tuple(kept), tuple(above))
        if key not in self._errors:
            total = 0.0
            positions = self._positions(above, kept)
            for rows in self._batches():
                result = run_block(self.blocks[block + 1], self._read(block, rows, kept), positions)
                wanted = self.features[block + 2][rows][:, above].to(self.device)
                difference = (result - wanted).square().sum(dim=(1, 2)).double()
                norm = wanted.square().sum(dim=(1, 2)).double().clamp_min(_TINY)  # all-zero features have no error
                total += float((difference / norm).sum())
            if not math.isfinite(total):
                raise InputRejected(f"the error of block {block + 2} under a cut is not finite: are the weights damaged?")
            self._errors[key] = total / self.images
        return self._errors[key]

    @torch.inference_mode()
    def _scores(self, block: int, above: list[int], grams: list[PathGram]) -> Tensor:
        """Eq. 6 for every token of ``block``'s output, a mean over the images: (N,). ``grams`` are at the rows ``above``."""
        total = torch.zeros(self.tokens, dtype=torch.float64)
        rows_above = torch.tensor(above, device=self.device)
        for gram, rows in zip(grams, self._batches(), strict=True):
            output = self.features[block + 1][rows].to(self.device)
            here = gram.through(attention_maps(self.blocks[block + 1], output, rows_above))
            total += paper_score(here.diagonal().cpu(), self.magnitudes[block][rows])
        return total / self.images

    @torch.inference_mode()
    def _carried(self, block: int, kept: list[int], above: list[int], grams: list[PathGram]) -> list[PathGram]:
        """The Gram at the rows that ``block`` keeps, now that its mask is set."""
        positions = self._positions(above, kept)
        carried = []
        for gram, rows in zip(grams, self._batches(), strict=True):
            here = gram.through(attention_maps(self.blocks[block + 1], self._read(block, rows, kept), positions))
            if self.mode == "stale":  # paths end at tokens that the block does not update
                index = torch.tensor(kept, device=self.device)
                value = here.value[:, index] if here.is_factor else here.value[:, index][:, :, index]
                here = PathGram(value, here.is_factor)
            stored = self.store.empty(*here.value.shape)
            stored.copy_(here.value)
            carried.append(PathGram(stored.to(self.device), here.is_factor))
        return carried

    def by_tolerance(self, tolerance: float) -> Selection:
        """The fewest tokens on the r' grid for which every E is at most ``tolerance``; the last block's cut is exact."""
        depth = len(self.blocks)
        kept: list[list[int]] = [[] for _ in range(depth)]
        errors = [0.0] * depth
        kept[-1] = list(self.head)
        grams = [PathGram.of_rows(rows.stop - rows.start, len(self.head), device=self.device) for rows in self._batches()]
        for block in range(depth - 2, -1, -1):
            above = kept[block + 1]
            base = sorted({*above, *range(self.prefix)})
            scores = self._scores(block, above, grams)
            ranking = torch.argsort(scores, descending=True, stable=True).tolist()
            kept[block], errors[block] = self._fewest(block, base, above, ranking, tolerance)
            grams = self._carried(block, kept[block], above, grams)
            self.progress("top-down search", depth - 1 - block, depth - 1)
        return Selection(kept, errors, tolerance)

    def _fewest(
        self, block: int, base: list[int], above: list[int], ranking: list[int], tolerance: float
    ) -> tuple[list[int], float]:
        """Bisect r on the r' grid: E falls as the top r tokens, united with ``base``, grow."""
        low, high = -1, math.ceil(self.tokens / self.step)  # E(high) is 0: every token; low is one below the grid

        def fits(index: int) -> bool:
            return self.error(block, kept_at(index), above) <= tolerance

        def kept_at(index: int) -> list[int]:
            return sorted({*base, *ranking[: index * self.step]})

        # Where the last walk ended is a good guess: leave it in doubling strides, then bisect what is left.
        guess, stride = min(self._hints.get(block, high // 2), high - 1), 1
        while low < guess < high:
            if fits(guess):
                high, guess = guess, guess - stride
            else:
                low, guess = guess, guess + stride
            stride *= 2
        while high - low > 1:
            middle = (low + high) // 2
            if fits(middle):
                high = middle
            else:
                low = middle
        self._hints[block] = high
        return kept_at(high), self.error(block, kept_at(high), above)

    def reduction(self, kept: list[list[int]]) -> float:
        """Fraction of the dense MACs that a plan removes, as laid."""
        counts = [len(tokens) for tokens in kept]
        dense = macs_of([self.tokens] * len(counts), self.tokens, self.geometry)
        return 1 - macs_of(counts, self.tokens, self.geometry, self.mode, self.layout) / dense

    def by_budget(self, reduction: float) -> Selection:
        """The selection of the smallest tolerance that removes at least ``reduction`` of the dense MACs (a fraction).

        Raises ``BudgetUnreachable`` naming the nearest reachable reduction.
        """
        floor = [sorted({*self.head, *range(self.prefix)})] * (len(self.blocks) - 1) + [self.head]
        if (most := self.reduction(floor)) < reduction:
            raise BudgetUnreachable(
                f"{reduction:.1%} of MACs cannot be removed: prefix tokens alone, in {self.mode} form, leave at most {most:.1%}"
            )
        everything, self.images = self.images, min(PROBE, self.images)
        probe = self._meet(reduction, _START, 1.0, PROBE_WALKS)
        self.images = everything
        return self._meet(reduction, probe.tolerance, 0.2, FULL_WALKS)

    def _meet(self, reduction: float, start: float, stride: float, walks: int) -> Selection:
        """Find the tolerance that just meets the budget: false position on its log, bracketed from ``start`` in strides."""
        best: Selection | None = None
        below: tuple[float, float] | None = None  # (log tolerance, MACs removed) of the closest walk on either side
        above: tuple[float, float] | None = None
        at, walked = math.log(start), 0
        while True:
            if best is not None and walked >= walks:
                return best
            found = self.by_tolerance(math.exp(at))
            removed = self.reduction(found.kept)
            walked += 1
            if removed >= reduction:
                above = (at, removed)
                if best is None or removed < self.reduction(best.kept):
                    best = found
                if removed - reduction < CLOSE_ENOUGH:
                    return best
            else:
                below = (at, removed)
            if above is None:
                at += stride
            elif below is None:
                at -= stride
                if best is not None and at < math.log(_LEAST):
                    return best
            else:
                share = (reduction + CLOSE_ENOUGH / 2 - below[1]) / max(above[1] - below[1], 1e-9)
                at = below[0] + (above[0] - below[0]) * min(max(share, 0.1), 0.9)

    def close(self) -> None:
        """Let go of the features; what was spilled of them goes with them."""
        self.features.clear()
        self.magnitudes.clear()
