"""Strict records as JSON files: read with a bound and a clear refusal, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema

from patchslim.errors import InputRejected
from patchslim.files import read_bounded
from patchslim.folders import temporary_file

#: A number of tokens, blocks, images or channels: at least one.
Count = Annotated[int, Field(ge=1, le=1_000_000)]
#: The original index of a token.
TokenIndex = Annotated[int, Field(ge=0)]
#: A JSON file of more bytes is refused.
MAX_JSON_BYTES = 64 << 20
_MOST_CONTAINERS = 1_000_000  # an empty list takes three bytes of a file and some sixty of memory
_MOST_NAMES = 10_000  # in one object: each unknown one is a fault of its own, and takes some 200 bytes


def _whole(value: object) -> object:
    if type(value) is not int:
        raise ValueError(f"must be the number 1, not {value!r}")
    return value


#: The version of a record's schema. A plain ``Literal`` would take ``true`` and ``1.0``, which equal 1 in Python.
VersionOne = Annotated[Literal[1], BeforeValidator(_whole)]


class StrictRecord(BaseModel):
    """Base of every record that others read: unknown fields and wrong types are refused, and NaN is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Stop at the first wrong item of a list: a fault for each of a million of them would take gigabytes.

        Lists stand for tuples, and objects for records, as they do in JSON.
        """
        schema = handler(source)
        waiting: list[Any] = [schema]
        while waiting:
            part = waiting.pop()
            if isinstance(part, dict):
                if part.get("type") in ("list", "tuple"):
                    part["fail_fast"] = True
                if part.get("type") in ("tuple", "model"):
                    part["strict"] = False
                waiting.extend(part.values())
            elif isinstance(part, list):
                waiting.extend(part)
        return schema


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
    if data.count(b"[") + data.count(b"{") > _MOST_CONTAINERS:
        raise InputRejected(f"{path}: not a valid {what}: holds more than {_MOST_CONTAINERS} lists and objects")
    try:
        try:
            value = json.loads(data, object_pairs_hook=_object)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            kind.model_validate_json(data)  # which says better what is wrong
            raise
        # Not from the JSON text: there pydantic makes an object of the whole input anew for each field that is missing.
        record = kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or what
        fault = "Input should be an object" if first["type"] == "model_type" else first["msg"]
        raise InputRejected(f"{path}: not a valid {what}: {where}: {fault}") from None  # its text holds the whole file
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise InputRejected(f"{path}: not a valid {what}: {error}") from None
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses a name that it has twice, of which readers take either, and more names than any record has."""
    if len(pairs) > _MOST_NAMES:
        raise ValueError(f"an object of {len(pairs)} names, and at most {_MOST_NAMES} are allowed")
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r}: is given twice")
    return dict(pairs)


def save_record(path: Path, record: StrictRecord) -> None:
    """Write a record as JSON, whole or not at all; the same record gives the same bytes. Raises ``OSError``."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False)
    with atomic_path(path) as part:
        part.write_text(text + "\n", encoding="utf-8", newline="\n")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it replaces ``path`` when the block succeeds, and vanishes when it does not.

    The file gets the mode that the umask gives, whoever writes it. What a killed process left of an earlier try is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path) as part:
        mode = part.stat().st_mode & 0o777
        yield part
        if part.stat().st_mode & 0o777 != mode:  # some libraries' files are their owner's alone
            part.chmod(mode)
        part.replace(path)
