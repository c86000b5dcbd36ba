"""The pipeline: from a PyTorch Vision Transformer to a checked hand-off bundle.

- ``Options``: every choice of an export, with its default.
- ``export_bundle(options) -> Outcome``: run it; ``Outcome.bundle`` is the folder, ``Outcome.parity`` the report.

``python -m export.run`` does it from the command line. Names load on first use, so that importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.config import Options
    from export.pipeline import Outcome, export_bundle

__all__ = ["Options", "Outcome", "export_bundle"]

_HOME = {"Options": "config", "Outcome": "pipeline", "export_bundle": "pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'export' has no attribute '{name}'")
    return getattr(import_module(f"export.{_HOME[name]}"), name)
