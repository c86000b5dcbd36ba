"""Check a bundle: whole, untampered, and answering like the model it was made from. Needs neither torch nor timm."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "BundleVerdict": "check",
    "Manifest": "schema",
    "ParityReport": "schema",
    "Rung": "schema",
    "check_bundle": "check",
    "compare_latency": "latency",
    "gate": "parity",
    "load_manifest": "bundle",
    "load_parity": "bundle",
    "manifest_schema": "schema",
    "parity_schema": "schema",
    "rung": "parity",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"validate.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
