"""The weights that go with a plan: written beside it, and read back only as the ones that it names."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING

from patchslim.choices import Fit
from patchslim.errors import InputRejected
from patchslim.folders import sweep, temporary_folder, temporary_form
from patchslim.plan import FittedWeights, SlimPlan, load_plan
from patchslim.records import atomic_path
from slimming.models.checkpoint import read_checkpoint
from slimming.models.weights import apply_weights, state_digest

if TYPE_CHECKING:
    from torch import nn


def save_fitted(
    plan: SlimPlan, model: nn.Module, path: Path, fit: Fit, finetune: dict[str, float | int | str] | None = None
) -> SlimPlan:
    """Write ``plan`` to ``path``, and ``model``'s weights beside it where they are not the original's.

    The weights go to ``STEM-<start of their digest>.safetensors``, so that the pair which ``path`` held stays whole until the
    new one is; then its weights are removed. Returns the plan as written. Raises ``OSError``.
    """
    from safetensors.torch import save_file

    old = _weights_of(path)
    if fit != "none" or finetune is not None:
        state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
        digest = state_digest(state)
        weights, prefix = path.with_name(f"{_plain(path.stem)}-{digest[:8]}.safetensors"), f".{_plain(path.stem)}.weights."
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(temporary_form(re.escape(prefix), ".part"), path.parent)
        # In a folder, since safetensors has a temporary file of its own, which a killed process leaves as well.
        with temporary_folder(prefix, ".part", path.parent) as folder:
            with atomic_path(folder / weights.name) as part:
                save_file(state, part)
            (folder / weights.name).replace(weights)
        record = FittedWeights(file=weights.name, sha256=digest, fit=fit, finetune=finetune)
        plan = plan.model_copy(update={"weights": record})
    plan.save(path)
    if old is not None and (plan.weights is None or old.name != plan.weights.file):
        old.unlink(missing_ok=True)
    return plan


def _plain(stem: str) -> str:
    """A plan's name as a file name of any system: what a plan may name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem)[:100].lstrip(".-") or "plan"


def _weights_of(path: Path) -> Path | None:
    """The weights that ``save_fitted`` wrote beside the plan at ``path``, if that is how this plan was written."""
    with contextlib.suppress(InputRejected):  # nothing there, or no plan
        record = load_plan(path).weights
        if record and record.file and re.fullmatch(rf"{re.escape(_plain(path.stem))}-[0-9a-f]{{8}}\.safetensors", record.file):
            return path.with_name(record.file)
    return None


def load_fitted(plan: SlimPlan, path: Path, model: nn.Module) -> nn.Module:
    """Return the model to run under the plan read from ``path``: ``model`` itself, or a copy with the weights beside it.

    Raises ``InputRejected`` where they are missing or not the ones that the plan names.
    """
    if plan.weights is None:
        return model
    if plan.weights.file is None:
        raise InputRejected(
            f"{path}: its weights were fitted to the cut, and a bundle has them in its ONNX files alone; "
            "pass a plan.json of slimming.run, or search again with the same options"
        )
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
