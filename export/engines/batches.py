"""The batch sizes that an engine is built for, and how they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from patchslim.errors import UsageError
from validate.build_recipe import MAX_PROFILES

Batch = tuple[int, int, int]
"""Smallest, most usual and largest batch of an optimisation profile."""

DEFAULT_BATCH: Batch = (1, 8, 32)

#: Of a batch in a build recipe.
_LARGEST_BATCH = 1 << 16


def parse_batches(given: str | Sequence[str]) -> tuple[Batch, ...]:
    """The optimisation profiles that ``--batch`` asks for: several with commas, or given again; ``DEFAULT_BATCH`` of none.

    Raises ``UsageError`` for what are none.
    """
    text = batches_given(given)
    profiles = tuple(_profile(text, words) for words in text.split(",")) if given else (DEFAULT_BATCH,)
    if len(profiles) > MAX_PROFILES:
        raise UsageError(f"--batch {text}: at most {MAX_PROFILES} profiles")
    if len(set(profiles)) != len(profiles):
        raise UsageError(f"--batch {text}: a profile is given twice")
    return profiles


def batches_given(given: str | Sequence[str]) -> str:
    """What ``--batch`` was given, with commas."""
    return given if isinstance(given, str) else ",".join(given)


def all_of(profiles: Sequence[Batch]) -> Batch:
    """What several optimisation profiles take together; the most usual batch is that of the one for the largest batches."""
    widest = max(profiles, key=lambda profile: profile[2])
    return min(profile[0] for profile in profiles), widest[1], widest[2]


def _profile(given: str, words: str) -> Batch:
    """One profile of ``--batch``. Raises ``UsageError`` for what is none."""
    try:
        smallest, usual, largest = (int(size) for size in (words.split(":") if ":" in words else [words] * 3))
    except ValueError:
        raise UsageError(f"--batch {given}: must be MIN:USUAL:MAX, as 1:8:32, or one number, several with commas") from None
    if not 1 <= smallest <= usual <= largest <= _LARGEST_BATCH:
        raise UsageError(f"--batch {given}: needs 1 <= MIN <= USUAL <= MAX <= {_LARGEST_BATCH}")
    return smallest, usual, largest
