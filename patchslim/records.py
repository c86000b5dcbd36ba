"""Strict records, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

#: A number of tokens, blocks, images or channels: at least one.
Count = Annotated[int, Field(ge=1, le=1_000_000)]
#: The original index of a token.
TokenIndex = Annotated[int, Field(ge=0)]


class StrictRecord(BaseModel):
    """Base of every record that others read: unknown fields and wrong types are refused, and NaN is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it replaces ``path`` when the block succeeds, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
