"""Static merging: a dropped token leaves a constant mean of itself and similar tokens behind.

Which tokens are alike on average is a property of positions, so the groups can be constants of the plan: by Ward's method
(1963) on the dense model's features, each step merges the two groups whose mean then differs least from their members, summed
over the calibration images. ToMe (2210.09461) matches tokens in every image anew; a constant match costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from slimming.models.token_cut import Cut, averages_of, cuts_of
from slimming.search.features import ERROR_IMAGES, DenseFeatures
from slimming.search.top_down import Selection, TopDownSearch, divergence_of

#: The share of the calibration images that errors and divergences are measured on: no score is computed, so there is time.
JUDGED = 0.5
#: The share that trials by the dozen are measured on.
QUICKLY_JUDGED = 0.125
_NEVER = float("inf")


class MergeSearch:
    """Merges, block after block from the first, the groups of patches that are most alike. No score is computed.

    Distances look at every calibration image, errors and divergences at half of them. For heads that read single
    tokens. A ``ProfileEvaluator``.
    """

    def __init__(self, features: DenseFeatures) -> None:
        self.features, self.reader = features, features.reader
        self.depth, self.tokens, self.prefix = len(self.reader.blocks), self.reader.tokens, self.reader.prefix
        self.fixed_head: int | None = len(self.reader.head.tokens)
        self.readable, self.beside = len(self.reader.head.tokens), 0
        self.sample = features.spread(max(ERROR_IMAGES, round(JUDGED * features.images)))
        self.quick_sample = features.spread(max(ERROR_IMAGES, round(QUICKLY_JUDGED * features.images)))
        self._distances: dict[int, NDArray[np.float64]] = {}

    def by_counts(self, counts: Sequence[int]) -> Selection:
        """Return ``counts[l]`` tokens out of every block l, with the error that each cut causes in the block above."""
        kept, merged_into = self.groups(counts)
        return Selection(kept, self._errors(kept, merged_into), None, merged_into)

    def divergence(self, counts: Sequence[int]) -> float:
        """Return the mean KL divergence (nats) of the plan's answers to the dense model's, without a fit."""
        return divergence_of(self.features, *self.groups(counts), self.sample)

    def quick_divergence(self, counts: Sequence[int]) -> float:
        """Return the same on fewer images."""
        return divergence_of(self.features, *self.groups(counts), self.quick_sample)

    def groups(self, counts: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """Return the tokens that stand for the groups behind every block, and the token that each other one was merged into."""
        merged_into = [-1] * self.tokens
        members = {token: [token] for token in range(self.prefix, self.tokens)}
        kept: list[list[int]] = []
        self.features.work.begin(self.depth - 1)
        for block, count in enumerate(counts[:-1]):
            if count - self.prefix < len(members):
                members = self._merged(block, members, count - self.prefix, merged_into)
            kept.append([*range(self.prefix), *sorted(members)])
            self.features.work.step()
        return [*kept, list(self.reader.head.tokens)], merged_into

    def _merged(self, block: int, members: dict[int, list[int]], count: int, merged_into: list[int]) -> dict[int, list[int]]:
        """``members`` merged to ``count`` groups by Ward's method on its input; of two the larger takes the other in."""
        names = sorted(members)
        sizes = np.array([len(members[name]) for name in names], dtype=np.float64)
        shares = np.zeros((len(names), self.tokens))
        for row, name in enumerate(names):
            shares[row, members[name]] = 1 / len(members[name])
        between = shares @ self.distances(block) @ shares.T
        within = np.diagonal(between)
        gain = np.outer(sizes, sizes) / (sizes[:, None] + sizes[None])
        cost = gain * (between - (within[:, None] + within[None]) / 2)
        np.fill_diagonal(cost, _NEVER)
        result = dict(members)
        for left in range(len(names), max(count, 0), -1):
            if left == 1:  # no patch is to be kept: the last one is dropped
                result.clear()
                break
            first, second = divmod(int(cost.argmin()), len(names))
            into, gone = (first, second) if sizes[first] >= sizes[second] else (second, first)
            # Lance and Williams' update for Ward's criterion (1967).
            total = sizes + sizes[into] + sizes[gone]
            row = ((sizes[into] + sizes) * cost[into] + (sizes[gone] + sizes) * cost[gone] - sizes * cost[into, gone]) / total
            row[~np.isfinite(cost[into]) | ~np.isfinite(cost[gone])] = _NEVER
            cost[into], cost[:, into] = row, row
            cost[gone], cost[:, gone] = _NEVER, _NEVER
            sizes[into] += sizes[gone]
            result[names[into]] = [*result[names[into]], *result.pop(names[gone])]
        for into, group in result.items():
            for token in set(group) & set(names) - {into}:
                merged_into[token] = into
        return result

    @torch.inference_mode()
    def distances(self, block: int) -> NDArray[np.float64]:
        """Return the squared distances (N, N) between the block's input tokens, summed over all calibration images."""
        if block not in self._distances:
            features, parts = self.features, []
            for rows in features.rows(features.all_batches):
                tokens = features.output(block - 1, rows)
                gram = torch.einsum("bnd,bmd->nm", tokens, tokens).double().cpu()
                parts.append(gram)
            gram = features.process_group.sum_over_batches(parts, features.all_batches)
            own = gram.diagonal()
            self._distances[block] = (own[:, None] + own[None] - 2 * gram).clamp_min(0).numpy()
        return self._distances[block]

    @torch.inference_mode()
    def _errors(self, kept: list[list[int]], merged_into: list[int]) -> list[float]:
        """E above each cut: what the block above makes of merged dense tokens, against the means of what it made of all."""
        features = self.features
        cuts = cuts_of(kept, self.tokens, "compact", merged_into)
        averages = [matrix.to(features.device) for matrix in averages_of(kept, self.tokens, merged_into)]
        errors = [0.0] * self.depth
        cut = [block for block in range(self.depth - 1) if len(kept[block]) < self.tokens]
        features.work.begin(len(cut))
        for block in cut:
            above = cuts[block + 1].to(features.device)

            def look(rows: slice, block: int = block, above: Cut = above) -> tuple[torch.Tensor, torch.Tensor]:
                read = averages[block] @ features.output(block, rows)
                result = self.reader.blocks[block + 1].run(above.view(read, features.ropes[block + 1]))
                return result, averages[block + 1] @ features.output(block + 1, rows)

            errors[block] = features.mean_relative(block, look, self.sample)
            features.work.step()
        return errors


class SummarySearch:
    """Another search whose plans keep the mean of all that they drop as one more token, in the place of the first one dropped.

    Its counts have that token in them. Related: EViT's fused token. For heads that read single tokens. A ``ProfileEvaluator``.
    """

    def __init__(self, search: TopDownSearch) -> None:
        self.search = search
        self.tokens, self.depth, self.prefix = search.tokens, search.depth, search.prefix + 1
        self.fixed_head, self.readable, self.beside = search.fixed_head, search.readable, search.beside

    def by_counts(self, counts: Sequence[int]) -> Selection:
        """Return the other search's selection with the summary; its errors are those without it."""
        return with_summary(self.search.by_counts(self._without(counts)), self.tokens)

    def divergence(self, counts: Sequence[int]) -> float:
        """Return the mean KL divergence to the dense model's answers, on the sample, in nats."""
        return divergence_of(self.search.features, *_summarised(self.search.kept_on_sample(self._without(counts)), self.tokens))

    def quick_divergence(self, counts: Sequence[int]) -> float:
        """Return the same: the sample is small already."""
        return self.divergence(counts)

    def _without(self, counts: Sequence[int]) -> list[int]:
        return [*(count if count == self.tokens else count - 1 for count in counts[:-1]), counts[-1]]


def with_summary(selection: Selection, tokens: int) -> Selection:
    """Return the selection with all that it drops merged into the first patch dropped, which then is one more token."""
    kept, merged_into = _summarised(selection.kept, tokens)
    return Selection(kept, selection.errors, selection.tolerance, merged_into)


def _summarised(kept: list[list[int]], tokens: int) -> tuple[list[list[int]], list[int]]:
    merged_into = [-1] * tokens
    first = next((block for block in kept[:-1] if len(block) < tokens), None)
    if first is None:
        return kept, merged_into
    stand_in = min(set(range(tokens)) - set(first))
    for token in set(range(tokens)) - set(kept[-2]) - {stand_in}:
        merged_into[token] = stand_in
    return [*(block if len(block) == tokens else sorted({*block, stand_in}) for block in kept[:-1]), kept[-1]], merged_into
