"""What one reader's fuzzing is: which files it is given, how they are mutated, what reads them, which errors it may raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from patchslim.errors import PatchslimError

#: Relative paths and bytes of one input.
Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """One reader of files that may come from a stranger.

    ``share`` is its part of the inputs, ``valid`` gives files that it must read, ``make`` mutated ones, ``read`` reads those in
    a folder, and ``refusals`` are the errors that it may raise.
    """

    name: str
    share: float
    valid: Callable[[], Files]
    make: Callable[[Random], Files]
    read: Callable[[Path], object]
    refusals: tuple[type[Exception], ...] = (PatchslimError,)
