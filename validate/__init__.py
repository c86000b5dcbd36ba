"""Check a bundle: whole, untampered, and answering like the model it was made from. Needs neither torch nor timm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchslim.lazy import lazy_names

if TYPE_CHECKING:
    from validate.bundle import load_manifest, load_parity
    from validate.bundle_runner import BundleRunner, open_runner
    from validate.check import check_bundle
    from validate.latency import compare_latency
    from validate.manifest import Manifest, manifest_schema
    from validate.parity import gate, rung
    from validate.parity_records import ParityReport, Rung, parity_schema

__all__ = [
    "BundleRunner",
    "BundleVerdict",
    "Manifest",
    "ParityReport",
    "Rung",
    "check_bundle",
    "compare_latency",
    "gate",
    "load_manifest",
    "load_parity",
    "manifest_schema",
    "open_runner",
    "parity_schema",
    "rung",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BundleRunner": "validate.bundle_runner",
        "BundleVerdict": "validate.verdict",
        "Manifest": "validate.manifest",
        "ParityReport": "validate.parity_records",
        "Rung": "validate.parity_records",
        "check_bundle": "validate.check",
        "compare_latency": "validate.latency",
        "gate": "validate.parity",
        "load_manifest": "validate.bundle",
        "load_parity": "validate.bundle",
        "manifest_schema": "validate.manifest",
        "open_runner": "validate.bundle_runner",
        "parity_schema": "validate.parity_records",
        "rung": "validate.parity",
    },
)
