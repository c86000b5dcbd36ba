"""Environment variables: those read as options (one that cannot be read is a wrong option), and what threads are told."""

from __future__ import annotations

import os

from patchslim.errors import UsageError


def whole_number(name: str, default: int, *, least: int = 0) -> int:
    """The environment variable ``name`` as a whole number. Raises ``UsageError`` where it is none, or below ``least``."""
    text = os.environ.get(name) or str(default)
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        wrong = f"environment variable {name}={text}: must be a whole number from {least}, as torchrun sets it"
        raise UsageError(wrong, next_step="unset it")
    return number


def processes() -> int:
    """How many processes torchrun started; 1 without it. Raises ``UsageError``."""
    return whole_number("WORLD_SIZE", 1, least=1)


def let_idle_threads_sleep() -> None:
    """Have OpenMP's waiting threads sleep, unless the user said otherwise; call it before torch is imported.

    They spin by default, on cores that others then lack. Beside five other processes on two cores PyTorch ran at 25 images of
    ViT-Ti a second instead of 8 for it, and alone at 55 either way (one trial).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
