"""Which tokens each block of a Vision Transformer can do without: model and calibration images in, ``SlimPlan`` out.

- ``find_plan(model, images, PlanRequest(Budget("macs-reduction", 0.45)), name=..., transform=...)``: a plan and fitted weights.
- ``PlanFinder(reader_of(model), images, name=..., transform=...)``: the same for many plans on one set of features.
- ``dense_plan(model, name)``, ``make_plan(model, name, kept)``: plans without a search.
- ``SlimViT(model, plan)``: the PyTorch reference of a model under a plan.
- ``SlimPlan``, ``load_plan(path)``: the plan itself; free of torch.
- ``load_model(name, weights=...)``, ``calibration_set(address, count)``, ``evaluation_set(address, count)``: what to give it.

``python -m slimming.run`` does it from the command line. Names load on first use, so that importing the package is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchslim.lazy import lazy_names

if TYPE_CHECKING:
    from patchslim.plan import SlimPlan, load_plan
    from slimming.api import FinderSettings, FoundPlan, PlanFinder, dense_plan, find_plan, make_plan
    from slimming.data.source import calibration_set, evaluation_set
    from slimming.models.loading import load_model
    from slimming.models.reader import reader_of
    from slimming.models.slim_vit import SlimViT
    from slimming.search.budget import Budget
    from slimming.search.request import PlanRequest

__all__ = [
    "Budget",
    "FinderSettings",
    "FoundPlan",
    "PlanFinder",
    "PlanRequest",
    "SlimPlan",
    "SlimViT",
    "calibration_set",
    "dense_plan",
    "evaluation_set",
    "find_plan",
    "load_model",
    "load_plan",
    "make_plan",
    "reader_of",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Budget": "slimming.search.budget",
        "FinderSettings": "slimming.api",
        "PlanFinder": "slimming.api",
        "PlanRequest": "slimming.search.request",
        "FoundPlan": "slimming.api",
        "SlimPlan": "patchslim.plan",
        "SlimViT": "slimming.models.slim_vit",
        "calibration_set": "slimming.data.source",
        "dense_plan": "slimming.api",
        "evaluation_set": "slimming.data.source",
        "find_plan": "slimming.api",
        "load_model": "slimming.models.loading",
        "load_plan": "patchslim.plan",
        "make_plan": "slimming.api",
        "reader_of": "slimming.models.reader",
    },
)
