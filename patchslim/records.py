"""Strict records as JSON files: read with a bound and a clear refusal, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from patchslim.errors import InputRejected

#: A number of tokens, blocks, images or channels: at least one.
Count = Annotated[int, Field(ge=1, le=1_000_000)]
#: The original index of a token.
TokenIndex = Annotated[int, Field(ge=0)]
#: A JSON file of more bytes is refused.
MAX_JSON_BYTES = 64 << 20


class StrictRecord(BaseModel):
    """Base of every record that others read: unknown fields and wrong types are refused, and NaN is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_Record = TypeVar("_Record", bound=StrictRecord)


def load_record(path: Path, kind: type[_Record], what: str) -> _Record:
    """Read a JSON file as a ``kind``; ``what`` is the record's name in messages.

    Raises ``InputRejected`` naming the file, the field and the fault: a file that is missing, unreadable, empty, larger than
    ``MAX_JSON_BYTES`` or no JSON, a field that is missing, unknown or of another type, a rule of the record that is broken.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise InputRejected(f"{path}: is missing: it cannot be read as a {what}") from error
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read as a {what}: {error.strerror or error}") from error
    if not data:
        raise InputRejected(f"{path}: not a valid {what}: the file is empty")
    if len(data) > MAX_JSON_BYTES:
        raise InputRejected(f"{path}: not a valid {what}: has more than the {MAX_JSON_BYTES} bytes allowed")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or what
        raise InputRejected(f"{path}: not a valid {what}: {where}: {first['msg']}") from None  # its text holds the whole file


def save_record(path: Path, record: StrictRecord) -> None:
    """Write a record as JSON, whole or not at all; the same record gives the same bytes. Raises ``OSError``."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False)
    with atomic_path(path) as part:
        part.write_text(text + "\n", encoding="utf-8", newline="\n")


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
