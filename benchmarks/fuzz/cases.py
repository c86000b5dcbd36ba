"""One input: made again from its seed at any time, written, read, and judged."""

from __future__ import annotations

import contextlib
import importlib
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from benchmarks.fuzz.target import Files, Target

Kind = Literal["read", "refused", "undocumented", "crash", "hang", "memory"]
KINDS: tuple[Kind, ...] = ("read", "refused", "undocumented", "crash", "hang", "memory")
BAD: tuple[Kind, ...] = KINDS[2:]
#: What libraries in C++ say where an allocation fails, in errors that are not ``MemoryError``.
_NO_MEMORY = ("not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "bad allocation")


@dataclass(frozen=True)
class Outcome:
    """How the reading of one input ended; ``seconds`` of processor time, ``error`` where it was bad."""

    kind: Kind
    seconds: float
    error: str = ""


def targets_of(module: str) -> dict[str, Target]:
    """The readers that ``module`` lists as ``TARGETS``, by name."""
    return {target.name: target for target in importlib.import_module(module).TARGETS}


def files_of(target: Target, seed: int, index: int) -> Files:
    """Input ``index`` of a reader: the same for the same seed, in every process."""
    return target.make(Random(f"{seed} {target.name} {index}"))


def write(folder: Path, files: Files) -> None:
    """Write an input's files as new ones: a mapping of an earlier input's file never sees them."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)


def remove(folder: Path, files: Files) -> None:
    """Remove an input's files, but not their folders."""
    for name in files:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def outcome_of(target: Target, folder: Path) -> Outcome:
    """Read the input in ``folder`` and say how that ended."""
    started = time.process_time()
    kind: Kind = "read"
    error = ""
    try:
        target.read(folder)
    except BaseException as raised:  # a panic in Rust is no ``Exception``
        kind, error = _judged(target, raised)
        raised.__traceback__ = None
    return Outcome(kind, time.process_time() - started, error)


def _judged(target: Target, raised: BaseException) -> tuple[Kind, str]:
    chain: BaseException | None = raised
    seen = set[int]()  # an error may be its own cause
    while chain is not None and id(chain) not in seen:  # a reader may have made a refusal of it
        seen.add(id(chain))
        if isinstance(chain, MemoryError) or (
            type(chain) is RuntimeError and any(text in str(chain).lower() for text in _NO_MEMORY)
        ):
            return "memory", _described(raised)
        chain = chain.__cause__ or chain.__context__
    if isinstance(raised, target.refusals):
        return "refused", ""
    return "undocumented", _described(raised)


def _described(raised: BaseException) -> str:
    """The error and the last lines of code that it passed through, without the folders that these are in."""
    frames = traceback.extract_tb(raised.__traceback__)[-4:]
    places = " < ".join(f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(raised).__name__}: {str(raised)[:300]} ({places})"
