"""The pipeline: from a PyTorch Vision Transformer to a checked hand-off bundle.

- ``ExportOptions``: every choice of an export, with its default.
- ``export_bundle(options) -> Outcome``: run it; ``Outcome.bundle`` is the folder, ``Outcome.parity`` the report.

``python -m export.run`` does it from the command line. Names load on first use, so that importing the package is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchslim.lazy import lazy_names

if TYPE_CHECKING:
    from export.options import ExportOptions
    from export.pipeline import Outcome, export_bundle

__all__ = ["ExportOptions", "Outcome", "export_bundle"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ExportOptions": "export.options",
        "Outcome": "export.pipeline",
        "export_bundle": "export.pipeline",
    },
)
