"""Which tokens each block of a Vision Transformer can do without: model and calibration images in, ``SlimPlan`` out.

- ``find(model, images, name=..., transform=..., budget=Budget("macs-reduction", 0.45))``: a plan, and the weights fitted to it.
- ``Calibrated(model, images, ...)``: the same for many plans on one set of features.
- ``dense_plan(model, name)``, ``make_plan(model, name, kept)``: plans without a search.
- ``SlimViT(model, plan)``: the PyTorch reference of a model under a plan.
- ``SlimPlan``, ``load_plan(path)``: the plan itself; free of torch.
- ``load_model(name, weights=...)``, ``calibration_set(address, count)``, ``evaluation_set(address, count)``: what to give it.

``python -m slimming.run`` does it from the command line. Names load on first use, so that importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimming.api import Calibrated, Found, dense_plan, find, make_plan
    from slimming.budget import Budget
    from slimming.data import calibration_set, evaluation_set
    from slimming.models import load_model
    from slimming.plan import SlimPlan, load_plan
    from slimming.slim_vit import SlimViT

__all__ = [
    "Budget",
    "Calibrated",
    "Found",
    "SlimPlan",
    "SlimViT",
    "calibration_set",
    "dense_plan",
    "evaluation_set",
    "find",
    "load_model",
    "load_plan",
    "make_plan",
]

_HOME = {
    "Budget": "budget",
    "Calibrated": "api",
    "Found": "api",
    "SlimPlan": "plan",
    "SlimViT": "slim_vit",
    "calibration_set": "data",
    "dense_plan": "api",
    "evaluation_set": "data",
    "find": "api",
    "load_model": "models",
    "load_plan": "plan",
    "make_plan": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slimming' has no attribute '{name}'")
    return getattr(import_module(f"slimming.{_HOME[name]}"), name)
