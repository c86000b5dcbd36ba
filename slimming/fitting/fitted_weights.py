"""The weights that go with a plan: written beside it, and read back only as the ones that it names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from patchslim.choices import Fit
from patchslim.errors import InputRejected
from patchslim.plan import FittedWeights, SlimPlan
from patchslim.records import atomic_path
from slimming.models.checkpoint import read_checkpoint
from slimming.models.weights import apply_weights, state_digest

if TYPE_CHECKING:
    from torch import nn


def save_fitted(
    plan: SlimPlan, model: nn.Module, path: Path, fit: Fit, finetune: dict[str, float | int | str] | None = None
) -> SlimPlan:
    """Write ``plan`` to ``path``, and ``model``'s weights beside it where they are not the original's.

    Each file is whole or not there, and the plan comes last. Returns the plan as written. Raises ``OSError``.
    """
    from safetensors.torch import save_file

    if fit != "none" or finetune is not None:
        weights = path.with_suffix(".safetensors")
        state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
        with atomic_path(weights) as part:
            save_file(state, part)
        record = FittedWeights(file=weights.name, sha256=state_digest(state), fit=fit, finetune=finetune)
        plan = plan.model_copy(update={"weights": record})
    plan.save(path)
    return plan


def load_fitted(plan: SlimPlan, path: Path, model: nn.Module) -> nn.Module:
    """Return the model to run under the plan read from ``path``: ``model`` itself, or a copy with the weights beside it.

    Raises ``InputRejected`` where they are missing or not the ones that the plan names.
    """
    if plan.weights is None:
        return model
    file = path.with_name(plan.weights.file)
    if not file.is_file():
        raise InputRejected(
            f"{path}: its weights were fitted to the cut and belong beside it, as {plan.weights.file}; there are none"
        )
    state = read_checkpoint(file).state
    if state_digest(state) != plan.weights.sha256:
        raise InputRejected(f"{file}: not the weights that {path.name} was made with (their digest differs)")
    fitted = copy.deepcopy(model)
    apply_weights(fitted, state, file)
    return fitted
