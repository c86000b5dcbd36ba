"""The models that the installed timm knows, read from its source: importing it takes seconds, and PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path

from patchslim.errors import InputRejected, did_you_mean
from patchslim.packages import installed_version

PRESETS = {
    "vit_ti": "vit_tiny_patch16_224",
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "deit_ti": "deit_tiny_patch16_224",
    "deit_s": "deit_small_patch16_224",
    "deit_b": "deit_base_patch16_224",
}
#: How timm names a model: by the function that makes it.
_REGISTERED = re.compile(r"^@register_model\s*\ndef (\w+)", re.MULTILINE)


def timm_names() -> frozenset[str]:
    """Every model's name, as ``timm.list_models()``; none where timm is not installed."""
    loaded = sys.modules.get("timm")  # a program may have registered models of its own
    return _names_in_source() | frozenset(loaded.list_models() if loaded is not None else ())


@functools.cache
def _names_in_source() -> frozenset[str]:
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        return frozenset()
    sources = (Path(found.origin).parent / "models").glob("*.py")
    return frozenset(name for path in sources for name in _REGISTERED.findall(path.read_text(encoding="utf-8")))


def check_model_name(name: str) -> None:
    """Raise ``InputRejected`` unless ``name`` is a preset or, with or without the tag of its weights, one of timm's."""
    known, plain = timm_names(), name.split(".")[0]
    if known and plain not in known and name not in PRESETS:
        raise InputRejected(
            f"model {name}: not a preset ({', '.join(PRESETS)}) and not a model of timm {installed_version('timm')}"
            f"{did_you_mean(plain, [*PRESETS, *sorted(known)])}"
        )
