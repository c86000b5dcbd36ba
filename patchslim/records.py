"""Strict records as JSON files: read with a bound and a clear refusal, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from patchslim.errors import InputRejected
from patchslim.files import read_bounded

#: A number of tokens, blocks, images or channels: at least one.
Count = Annotated[int, Field(ge=1, le=1_000_000)]
#: The original index of a token.
TokenIndex = Annotated[int, Field(ge=0)]
#: A JSON file of more bytes is refused.
MAX_JSON_BYTES = 64 << 20


def _whole(value: object) -> object:
    if type(value) is not int:
        raise ValueError(f"must be the number 1, not {value!r}")
    return value


#: The version of a record's schema. A plain ``Literal`` would take ``true`` and ``1.0``, which equal 1 in Python.
VersionOne = Annotated[Literal[1], BeforeValidator(_whole)]


class StrictRecord(BaseModel):
    """Base of every record that others read: unknown fields and wrong types are refused, and NaN is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_Record = TypeVar("_Record", bound=StrictRecord)


def load_record(path: Path, kind: type[_Record], what: str, limit: int = MAX_JSON_BYTES) -> _Record:
    """Read a JSON file as a ``kind``; ``what`` is the record's name in messages.

    Raises ``InputRejected`` naming the file, the field and the fault: a file that is missing, unreadable, empty, no regular
    file, larger than ``limit`` bytes or no JSON, a field that is missing, unknown, given twice or of another type, a rule of
    the record that is broken.
    """
    return parse_record(read_bounded(path, limit, what), kind, what, path)


def parse_record(data: bytes, kind: type[_Record], what: str, path: Path) -> _Record:
    """``load_record`` of bytes that were read from ``path`` already."""
    if not data:
        raise InputRejected(f"{path}: not a valid {what}: the file is empty")
    try:
        record = kind.model_validate_json(data)
        json.loads(data, object_pairs_hook=_refuse_twice, parse_int=len, parse_float=len)  # only its names are of interest
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or what
        raise InputRejected(f"{path}: not a valid {what}: {where}: {first['msg']}") from None  # its text holds the whole file
    except ValueError as error:
        raise InputRejected(f"{path}: not a valid {what}: {error}") from None
    return record


def _refuse_twice(pairs: list[tuple[str, Any]]) -> None:
    """Refuse a name that an object has twice: readers differ in which of the two they take."""
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r}: is given twice")


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
