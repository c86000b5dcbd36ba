"""GPU generations that TensorRT engines are built for, and which machine runs which engine."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: One TensorRT-RTX engine for several generations, built with none of them set.
PORTABLE = "portable"
#: The generations that NVIDIA's documentation says such an engine serves: these, and from 12.0 on all. Not executed here.
_SERVED, _SERVED_FROM = (80, 86, 89), 120


def runs_on(target: str, local: str | None) -> bool:
    """Whether an engine for ``target`` runs on a GPU of the generation ``local``, as ``sm89``; None: there is no GPU."""
    if local is None or target != PORTABLE:
        return local is not None and target == local
    number = re.fullmatch(r"sm([0-9]+)", local)
    return number is not None and (int(number[1]) in _SERVED or int(number[1]) >= _SERVED_FROM)


def target_for(local: str | None, targets: Iterable[str]) -> str | None:
    """Of ``targets`` the one whose engine runs on ``local``: its own before the portable one; None where none does."""
    able = [target for target in targets if runs_on(target, local)]
    return next((target for target in able if target != PORTABLE), next(iter(able), None))
