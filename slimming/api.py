"""The door as a Python API: a plan for a model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from slimming.data import ImageSet, load_tensors
from slimming.door import UsageError
from slimming.plan import Calibration, Layout, Mode, Origin, SlimPlan
from slimming.search import STEP, Progress, TopDownSearch
from slimming.store import DEFAULT_BOUND
from slimming.vit import check_supported, geometry_of, head_tokens_of


def find_plan(
    model: Any,
    images: ImageSet,
    *,
    name: str,
    transform: Any,
    macs_reduction: float | None = 0.45,
    tolerance: float | None = None,
    mode: Mode = "compact",
    layout: Layout = "split",
    seed: int = 0,
    bound: int = DEFAULT_BOUND,
    progress: Progress | None = None,
) -> SlimPlan:
    """Find the top-down masks of a timm ViT by the paper's score on calibration images.

    Give either ``macs_reduction`` (a fraction of the dense MACs) or ``tolerance`` (on E_{l+1}). ``transform`` maps a PIL image
    to the model's input tensor. ``layout`` says how the cut projections will be laid, for the MAC count. ``bound`` is the
    number of bytes of per-image state held in memory before it spills to disk.
    Raises ``InputRejected`` for a model or images that cannot be used, ``BudgetUnreachable``, ``UsageError``.
    """
    check_supported(model, name)
    if tolerance is None and macs_reduction is None:
        raise UsageError("give a tolerance or a MAC reduction")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UsageError(f"--tolerance {tolerance}: must be a number from 0")
    if tolerance is None and macs_reduction is not None and not 0 <= macs_reduction < 1:
        raise UsageError(f"--macs-reduction {macs_reduction}: must be a fraction from 0 to below 1")
    digest = hashlib.sha256()

    def batches() -> Iterator[Tensor]:
        for batch, _ in load_tensors(images, transform):
            digest.update(batch.numpy().tobytes())
            yield batch

    # The paper's r' is too coarse to meet a budget: dropping 10 of DeiT's 197 tokens removes 5 % of its MACs.
    step = 1 if tolerance is None else STEP
    search = TopDownSearch(model, batches(), len(images), mode=mode, layout=layout, step=step, bound=bound, progress=progress)
    try:
        found = search.by_budget(macs_reduction or 0.0) if tolerance is None else search.by_tolerance(tolerance)
    finally:
        search.close()
    criterion: Literal["tolerance", "macs-reduction"] = "macs-reduction" if tolerance is None else "tolerance"
    origin = Origin(
        score="paper",
        criterion=criterion,
        value=float(macs_reduction or 0.0) if tolerance is None else float(tolerance),
        tolerance=float(found.tolerance),
        seed=seed,
        calibration=Calibration(
            data=f"{images.address} ({images.split}, {images.share})", images=len(images), fingerprint=digest.hexdigest()
        ),
    )
    return make_plan(model, name, found.kept, mode=mode, origin=origin)


def make_plan(
    model: Any, name: str, kept: list[list[int]], *, mode: Mode = "compact", origin: Origin | None = None
) -> SlimPlan:
    """A ``SlimPlan`` for ``model`` from masks; raises ``pydantic.ValidationError`` when they break a rule of ``SlimPlan``."""
    rows, columns = (int(side) for side in model.patch_embed.grid_size)
    prefix = int(model.num_prefix_tokens)
    return SlimPlan(
        model=name,
        tokens=prefix + rows * columns,
        grid=(rows, columns),
        prefix_tokens=prefix,
        pooling="token",
        head_tokens=head_tokens_of(model),
        mode=mode,
        kept=kept,
        geometry=geometry_of(model),
        origin=origin or Origin(score="none", criterion="manual", value=0.0),
    )


def dense_plan(model: Any, name: str) -> SlimPlan:
    """The plan that drops nothing, not even in the last block."""
    check_supported(model, name)
    tokens = int(model.num_prefix_tokens) + int(model.patch_embed.num_patches)
    origin = Origin(score="none", criterion="dense", value=0.0)
    return make_plan(model, name, [list(range(tokens))] * len(model.blocks), origin=origin)
