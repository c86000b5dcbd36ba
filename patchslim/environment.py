"""Environment variables that are read as options are: a value that cannot be read is a wrong option."""

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
