"""Closed-form compensation: refit each cut block's output projections, so that it answers as the dense one did.

A cut changes what a block's attention mixes and what its MLP is given. Its two output projections (W_o and W_2, with their
biases) are linear in what they read, so the best ones on the calibration rows are a ridge regression: no labels, no gradients,
and nothing is added at inference. Related: CORP (2602.05243), GRAIL (2602.23795), Kwon et al. (2204.09656).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from patchslim.errors import InputRejected
from patchslim.plan import SlimPlan
from patchslim.progress import StageProgress
from slimming.models.attention import AttentionInput
from slimming.models.blocks import Stage
from slimming.models.reader import ModelReader
from slimming.models.token_cut import Cut, averages_of, cuts_of
from slimming.search.features import DenseFeatures
from slimming.tensor_store import TensorStore

#: Ridge strength, a fraction of the mean diagonal of the inputs' second moments.
RIDGE = 0.03
#: Rows of statistics that are enough per input feature; past it, every second, third, ... row is left out.
ROWS_PER_FEATURE = 24
_TINY = 1e-6


def can_compensate(model: nn.Module) -> bool:
    """Return whether every output projection of the model is a plain linear layer; those of post-norm blocks are not."""
    return "closed-form" not in ModelReader(model).refusals


@torch.no_grad()
def compensate(
    model: nn.Module,
    features: DenseFeatures,
    plan: SlimPlan,
    *,
    ridge: float = RIDGE,
    progress: StageProgress | None = None,
) -> None:
    """Refit ``model``, a copy of the one that ``features`` belong to, in place, block by block from the first cut on.

    Each block is fitted on what the slimmed and already refitted blocks before it hand over, so that errors do not add up; its
    targets are the dense model's features at the rows that it keeps, or, where dropped tokens are merged, their means.
    Raises ``InputRejected`` for unusable statistics.
    """
    dense, slim = ModelReader(features.reader.model), ModelReader(model)
    batches = list(features.rows(features.all_batches))
    store = TensorStore(features.store.bound)
    streams = [features.output(-1, rows) for rows in batches]
    cuts = [cut.to(features.device) for cut in cuts_of(plan.kept, plan.tokens, plan.mode, plan.merged_into)]
    wanted = _Wanted(features, plan)
    if progress:
        progress("compensating", 0, plan.depth)
    for index, (kept, cut) in enumerate(zip(plan.kept, cuts, strict=True)):
        block, original, rope = slim.blocks[index], dense.blocks[index], features.ropes[index]
        if len(kept) == len(cut.places) == features.tokens:  # nothing differs yet
            streams = [features.output(index, rows) for rows in batches]
            continue
        look = partial(_seen, cut, rope)
        targets = [_kept(store, wanted.after_attention(index, original.stages[0], rows, rope)) for rows in batches]
        after = streams
        for number, stage in enumerate(block.stages):
            views = partial(_views, after, look if number == 0 else _whole)
            if number == len(block.stages) - 1:
                targets = [wanted.at(index, features.output(index, rows)) for rows in batches]
            _refit(stage, views, targets, features, ridge)
            after = [_kept(store, stage.run(view)) for view in views()]
        if plan.mode == "stale":
            after = [_kept(store, stream.index_copy(1, cut.rows, new)) for stream, new in zip(streams, after, strict=True)]
        streams = after
        if progress:
            progress("compensating", index + 1, plan.depth)


def _views(streams: list[Tensor], look: Callable[[Tensor], AttentionInput]) -> Iterator[AttentionInput]:
    """What a stage is given, batch by batch."""
    yield from map(look, streams)


def _whole(stream: Tensor) -> AttentionInput:
    return AttentionInput(stream, stream)


def _seen(cut: Cut, rope: Tensor | None, stream: Tensor) -> AttentionInput:
    """What a block's first stage sees of a stream."""
    return cut.view(stream, rope)


class _Wanted:
    """The dense model's features as a plan's tokens should have them: kept rows, or means of those that a token stands for."""

    def __init__(self, features: DenseFeatures, plan: SlimPlan) -> None:
        self.features, self.plan = features, plan
        averages = averages_of(plan.kept, plan.tokens, plan.merged_into) if plan.merged_into is not None else []
        self.averages = [matrix.to(features.device) for matrix in averages]

    def at(self, index: int, dense: Tensor) -> Tensor:
        """Of all tokens (b, N, d) those that block ``index`` computes: (b, k, d)."""
        return self.averages[index] @ dense if self.averages else dense[:, self.plan.kept[index]]

    def after_attention(self, index: int, stage: Stage, rows: slice, rope: Tensor | None) -> Tensor:
        """The same behind the dense block's first stage."""
        features = self.features
        queried = None if self.averages else self.plan.kept[index]
        result = stage.run(features.reader.view(features.output(index - 1, rows), features.everything, queried, rope))
        return self.at(index, result) if self.averages else result


def _kept(store: TensorStore, tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor
    stored = store.empty(*tensor.shape)
    stored.copy_(tensor)
    return stored


def normal_equations(inputs: Tensor, targets: Tensor) -> Tensor:
    """``inputs.T @ [inputs, targets]`` in float64: (n, size) and (n, out) in any floating type -> (size, size + out).

    The matrix product runs on the rows without their means, in the rows' type; the means' part is added in float64. Otherwise
    the rounding of large means, amplified by the condition of the equations, would end up in the fitted bias.
    """
    size, joint = inputs.shape[1], torch.cat([inputs, targets], dim=1)
    mean = joint.sum(dim=0) / max(len(joint), 1)
    centred = joint - mean
    products = (centred[:, :size].T @ centred).double()
    mean, rest = mean.double(), centred.sum(dim=0, dtype=torch.float64)  # rest: not quite zero, as the mean is rounded
    return products + torch.outer(rest[:size], mean) + torch.outer(mean[:size], rest + len(joint) * mean)


def _refit(
    stage: Stage, views: Callable[[], Iterator[AttentionInput]], wanted: list[Tensor], features: DenseFeatures, ridge: float
) -> None:
    """Change the stage's projections so that its output comes closest to ``wanted``, jointly where branches share an addition.

    Solves ``min_D sum ||X D - R||^2 + lambda ||D||^2`` for the change D, X what the projections read and R what is missing, so
    that without evidence nothing changes. LayerScale's gamma divides what it multiplies.
    """
    projections = [branch.projection for branch in stage.branches if branch.projection is not None]
    widths = [projection.in_features for projection in projections]
    biased = next((branch for branch in stage.branches if branch.projection and branch.projection.bias is not None), None)
    size, out = sum(widths) + int(biased is not None), projections[0].out_features
    total = features.images * (wanted[0].shape[1] if wanted else 1)
    stride = max(1, total // (ROWS_PER_FEATURE * size))
    sums = torch.zeros(size, size + out, dtype=torch.float64, device=features.device)
    # Rows are left out alike on any number of processes.
    for number, view, target in zip(features.own, views(), wanted, strict=True):
        inputs = [branch.inner(view) for branch in stage.branches]
        stream = view.queried
        for branch, read in zip(stage.branches, inputs, strict=True):
            stream = stream.add(branch.scale(branch.output(read)))
        missing = (target - stream).flatten(0, 1)[number % stride :: stride]
        rows = torch.cat([read.flatten(0, 1)[number % stride :: stride] for read in inputs], dim=1)
        if biased is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        sums += normal_equations(rows, missing)
    sums = features.process_group.all_reduce_sum(sums)
    moment, cross = sums[:, :size], sums[:, size:]
    if not bool(moment.isfinite().all()) or not bool(cross.isfinite().all()):
        raise InputRejected("the statistics of a block's refit are not finite: are the weights damaged?")
    strength = ridge * moment.diagonal()[: sum(widths)].mean().clamp_min(_TINY)
    penalty = strength.expand(size).clone()
    if biased is not None:
        penalty[-1] = _TINY * strength  # a bias is not held back
    change = torch.linalg.solve(moment + torch.diag(penalty), cross)
    at = 0
    for branch in stage.branches:
        assert branch.projection is not None
        width = branch.projection.in_features
        gamma = torch.ones(out, dtype=torch.float64, device=features.device) if branch.gamma is None else branch.gamma.double()
        gain = torch.where(gamma.abs() > _TINY, 1 / gamma, 0.0)
        branch.projection.weight += (change[at : at + width] * gain).T.to(branch.projection.weight)
        if branch is biased:
            assert branch.projection.bias is not None
            branch.projection.bias.add_((change[-1] * gain).to(branch.projection.bias))
        at += width
