"""Top-down selection (Algorithm 1): from the last block down, keep what the blocks above need."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from slimming.models.token_cut import cuts_of
from slimming.search.costs import Cost
from slimming.search.features import DenseFeatures
from slimming.search.profile import profile_within, snapped
from slimming.search.scores import PathGram, Score, Seen, SeenByHead, State

#: The paper's r': tokens are tried in steps of this many.
STEP = 10

#: Fits block ``block`` for a trial mask, and gives E of the block above: (block, kept, above) -> E.
TrialError = Callable[[int, list[int], list[int]], float]
#: What a block keeps, and the error of it: (block, tokens it must keep, tokens above, all tokens by significance) -> (kept, E).
Choose = Callable[[int, list[int], list[int], list[int]], tuple[list[int], float]]


@dataclass(frozen=True)
class Selection:
    """The tokens that every block keeps, the error that each cut causes, and the tolerance that led to them."""

    kept: list[list[int]]
    errors: list[float]  # E of what stands above each cut; 0 for a last block that keeps the head's tokens, whose cut is exact
    tolerance: float | None
    merged_into: list[int] | None = None  # see SlimPlan; None where dropped tokens are not merged


class TopDownSearch:
    """Algorithm 1 on the dense features of a model over calibration images.

    A walk goes from the last block to the first and carries the score's state (for Eq. 6 the path Gram) along. Scores look at
    every image, errors at the features' sample. ``fit`` refits a block before its error counts; without it nothing is fitted.
    """

    def __init__(self, features: DenseFeatures, score: Score, *, step: int = STEP, fit: TrialError | None = None) -> None:
        self.features, self.score, self.step, self.fit = features, score, step, fit
        self.reader = features.reader
        self.depth, self.tokens, self.prefix = len(self.reader.blocks), self.reader.tokens, self.reader.prefix
        self.head = self.reader.head
        self.beside = len(self.head.beside)
        self._errors: dict[tuple[int, tuple[int, ...], tuple[int, ...]], float] = {}
        self._hints: dict[int, int] = {}

    @property
    def fixed_head(self) -> int | None:
        """How many tokens the last block keeps, where the head fixes it."""
        return len(self.head.tokens) if self.head.fixed else None

    @property
    def readable(self) -> int:
        """How many tokens of the last block the head can read, or pool."""
        return len(self.head.tokens) - self.beside

    def error(self, block: int, kept: list[int], above: list[int]) -> float:
        """Return E above ``block`` when it keeps ``kept`` and what is above needs ``above``; see ``DenseFeatures.error``."""
        if self.fit is not None and block < self.depth - 1:  # also without a cut: a trial's weights must not stay
            return self.fit(block, kept, above)
        key = (block, tuple(kept), tuple(above))
        if key not in self._errors:
            self._errors[key] = self.features.error(block, kept, above)
        return self._errors[key]

    def by_tolerance(self, tolerance: float, *, snap: int = 1) -> Selection:
        """Return the fewest tokens on the r' grid for which every E is at most ``tolerance``.

        With ``snap`` the counts are then rounded up to its multiples, so that no error grows.
        """
        found = self._walk(lambda block, base, above, order: self._fewest(block, base, above, order, tolerance), tolerance)
        if snap == 1:
            return found
        counts = [len(kept) for kept in found.kept]
        counts[-1] -= self.beside
        return self.by_counts(snapped(self, counts, snap, "up"), tolerance)

    def by_counts(self, counts: Sequence[int], tolerance: float | None = None) -> Selection:
        """Return ``counts[l]`` tokens out of every block l, or as few as nesting allows, with the error of each cut."""
        return self._walk(self._chooser(counts, self.error), tolerance)

    def _chooser(self, counts: Sequence[int], error: TrialError) -> Choose:
        """A choice of the first tokens of the order, up to each block's count."""
        counts = [*counts[:-1], counts[-1] + self.beside]

        def choose(block: int, base: list[int], above: list[int], order: list[int]) -> tuple[list[int], float]:
            missing = [token for token in order if token not in set(base)]
            kept = sorted([*base, *missing[: max(0, counts[block] - len(base))]])
            return kept, error(block, kept, above)

        return choose

    @torch.inference_mode()
    def _walk(
        self,
        choose: Choose,
        tolerance: float | None,
        batches: list[int] | None = None,
    ) -> Selection:
        batches = self.features.all_batches if batches is None else batches
        self.features.work.begin(self.depth - 1)
        kept: list[list[int]] = [[] for _ in range(self.depth)]
        errors = [0.0] * self.depth
        kept[-1], errors[-1] = self._top(choose, batches)
        states = [
            self._stored(self.score.start(self.head.weights(self.features.output(self.depth - 1, rows)[:, kept[-1]])))
            for rows in self.features.rows(batches)
        ]
        for block in range(self.depth - 2, -1, -1):
            above = kept[block + 1]
            base = sorted({*above, *range(self.prefix)})
            kept[block], errors[block] = choose(block, base, above, self._by_significance(block, above, states, batches))
            if block:
                states = self._carried(block, kept[block], above, states, batches)
            self.features.work.step()
        return Selection(kept, errors, tolerance)

    def _top(self, choose: Choose, batches: list[int]) -> tuple[list[int], float]:
        """What the last block keeps: all that the head needs, or, where it pools, the tokens that its feature depends on."""
        reads = list(self.head.tokens)
        if self.head.fixed:
            return reads, 0.0
        total = partial(self.features.process_group.sum_over_batches, batches=batches)
        scores = self.score.head_scores(self.depth - 1, self.tokens, self._head_looks(reads, batches), total)
        readable, beside = set(reads), self.head.beside
        order = [token for token in torch.argsort(scores, descending=True, stable=True).tolist() if token in readable]
        pooled = [token for token in order if token not in set(beside)]
        kept, _ = choose(self.depth - 1, sorted([*beside, pooled[0]]), reads, pooled)
        kept = [token for token in kept if token in readable]
        return kept, 0.0 if kept == reads else self.error(self.depth - 1, kept, reads)

    def _head_looks(self, reads: list[int], batches: list[int]) -> Iterator[SeenByHead]:
        """The head on the last block's dense output, batch by batch."""
        for rows in self.features.rows(batches):
            weights = self.head.weights(self.features.output(self.depth - 1, rows)[:, reads])
            magnitude = self.features.magnitudes[-1][rows][:, reads] if self.score.needs_magnitude else None
            yield SeenByHead(weights, torch.tensor(reads), self.tokens, magnitude)

    def _by_significance(self, block: int, above: list[int], states: list[State], batches: list[int]) -> list[int]:
        """Every token of ``block``'s output, the most significant first."""
        total = partial(self.features.process_group.sum_over_batches, batches=batches)
        scores = self.score.scores(block, self.tokens, self._looks(block, above, states, batches), total)
        return torch.argsort(scores, descending=True, stable=True).tolist()

    def _looks(self, block: int, above: list[int], states: list[State], batches: list[int]) -> Iterator[tuple[State, Seen]]:
        """The block above with every token in its input, batch by batch."""
        for state, rows in zip(states, self.features.rows(batches), strict=True):
            seen = self._seen(block, rows, self.features.everything, above)
            if self.score.needs_magnitude:
                seen = dataclasses.replace(seen, magnitude=self.features.magnitudes[block][rows])
            yield state, seen

    def _seen(self, block: int, rows: slice, kept: list[int], above: list[int]) -> Seen:
        """The block above on dense features, of which ``kept`` are there."""
        features, reader = self.features, self.reader.blocks[block + 1]
        stale, dense = features.mode == "stale", len(kept) == self.tokens
        if dense:
            output = features.output(block, rows)
            view = self.reader.view(output, features.everything, above, features.ropes[block + 1])
        else:
            view = features.view(block, rows, kept, above)
        present = features.everything if stale else kept
        place = {token: position for position, token in enumerate(present)}
        positions = torch.tensor([place[token] for token in above], device=features.device)
        values = reader.value_norms(view) if self.score.needs_values else None
        updated = torch.tensor(kept, device=features.device) if stale and not dense else None
        return Seen(reader.maps(view), positions, values, updated=updated)

    def _carried(self, block: int, kept: list[int], above: list[int], states: list[State], batches: list[int]) -> list[State]:
        """The states below the block above, now that ``block``'s mask is set."""
        return [
            self._stored(self.score.carry(state, partial(self._seen, block, rows, kept, above)))
            for state, rows in zip(states, self.features.rows(batches), strict=True)
        ]

    def _stored(self, state: State) -> State:
        value = state.value if isinstance(state, PathGram) else state
        stored = self.features.store.empty(*value.shape)
        stored.copy_(value)
        moved = stored.to(self.features.device)
        return PathGram(moved, state.is_factor) if isinstance(state, PathGram) else moved

    def _fewest(
        self, block: int, base: list[int], above: list[int], order: list[int], tolerance: float
    ) -> tuple[list[int], float]:
        """Bisect r on the r' grid: E falls as the top r tokens, united with ``base``, grow."""
        low, high = -1, math.ceil(len(order) / self.step)  # E(high) is 0: every token; low is one below the grid

        def fits(index: int) -> bool:
            return self.error(block, kept_at(index), above) <= tolerance

        def kept_at(index: int) -> list[int]:
            return sorted({*base, *order[: index * self.step]})

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
        kept = kept_at(high)
        return kept, self.error(block, kept, above)

    def by_budget(self, cost: Cost, limit: float) -> Selection:
        """Return the selection on the best profile of counts that costs at most ``limit``; see ``slimming.search.profile``."""
        return self.by_counts(profile_within(self, cost, limit))

    @torch.inference_mode()
    def divergence(self, counts: Sequence[int]) -> float:
        """Return the mean KL divergence (nats) of the plan's answers to the dense model's, on the sample.

        The tokens are those that scores on the sample alone would keep.
        """
        return divergence_of(self.features, self.kept_on_sample(counts))

    def quick_divergence(self, counts: Sequence[int]) -> float:
        """Return ``divergence``, whose sample is small already."""
        return self.divergence(counts)

    def kept_on_sample(self, counts: Sequence[int]) -> list[list[int]]:
        """Return the tokens that scores on the sample alone would keep, block by block."""
        return self._walk(self._chooser(counts, lambda block, kept, above: 0.0), None, self.features.sample).kept


@torch.inference_mode()
def divergence_of(
    features: DenseFeatures, kept: list[list[int]], merged_into: list[int] | None = None, batches: list[int] | None = None
) -> float:
    """Return the mean KL divergence (nats) of a plan's answers to the dense model's on ``batches`` (None: the sample)."""
    batches = features.sample if batches is None else batches
    reader, last, found = features.reader, len(features.reader.blocks) - 1, []
    cuts = cuts_of(kept, features.tokens, features.mode, merged_into) if merged_into is not None else None
    stale, everything = features.mode == "stale", features.everything
    readable = set(kept[-1]) & set(reader.head.tokens)
    places = [position for position, token in enumerate(everything if stale else kept[-1]) if token in readable]
    own = list(features.rows(batches))
    features.work.begin(len(own))
    for rows in own:
        tokens, present = features.output(-1, rows), everything
        for index, (block, wanted, rope) in enumerate(zip(reader.blocks, kept, features.ropes, strict=True)):
            if cuts is not None:
                view = cuts[index].to(features.device).view(tokens, rope)
            else:
                view = reader.view(tokens, present, wanted, rope)
            result = block.run(view)
            tokens = tokens.index_copy(1, torch.tensor(wanted, device=features.device), result) if stale else result
            present = everything if stale else wanted
        slim = reader.head.logits(tokens[:, places])
        dense = reader.head.logits(features.output(last, rows)[:, reader.head.tokens])
        each = (dense.softmax(-1) * (dense.log_softmax(-1) - slim.log_softmax(-1))).sum(-1)
        found.append(each.double().sum().cpu())
        features.work.step()
    return float(features.process_group.sum_over_batches(found, batches)) / features.count(batches)
