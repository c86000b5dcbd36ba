"""Protobuf's wire format, as far as weights need it: finding fields in a file without parsing them, and writing their heads.

A message is a row of fields; each is a tag (its number and kind) and a value. See protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """What should be a protobuf message is not one, or is cut short."""


class Field(NamedTuple):
    """Where one field of a message is: ``start`` of its tag, ``value`` and ``end`` of what it holds, as offsets."""

    number: int
    kind: int
    start: int
    value: int
    end: int


def fields(data: memoryview, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in ``data[start:end]``, in file order; raises ``WireError`` where one does not fit."""
    position = start
    while position < end:
        tag, value = _read_varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise WireError(f"field number 0 at byte {position}")
        if kind == VARINT:
            _, after = _read_varint(data, value, end)
        elif kind == BYTES:
            length, value = _read_varint(data, value, end)
            after = value + length
        elif kind in (FIXED64, FIXED32):
            after = value + (8 if kind == FIXED64 else 4)
        else:
            raise WireError(f"a field of the unknown kind {kind} at byte {position}")
        if after > end:
            raise WireError(f"the field at byte {position} ends {after - end} bytes behind what holds it")
        yield Field(number, kind, position, value, after)
        position = after


def head(number: int, length: int) -> bytes:
    """Tag and length of a field of ``length`` bytes, to be written before them."""
    return _varint(number << 3 | BYTES) + _varint(length)


def _read_varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    """A number of seven bits per byte, lowest first, and the offset behind it."""
    result = 0
    for shift, offset in enumerate(range(position, min(position + 10, end))):
        byte = data[offset]
        result |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return result, offset + 1
    raise WireError(f"the number at byte {position} does not end")


def _varint(value: int) -> bytes:
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)
