"""Finds where the regular files of an uncompressed tar file lie, from its headers alone.

``tarfile`` takes about four times as long for each header, which in a million images is minutes, and takes a broken header in
the middle for the end of the archive. Formats: POSIX.1-2001 (ustar and pax interchange format) and GNU tar's extensions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO

BLOCK = 512
_END = bytes(BLOCK)
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: their size field counts for nothing
_LONGEST_EXTENSION = 1 << 20  # bytes of a header that continues in a member of its own


def regular_files(file: IO[bytes]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield each regular file's name, and the offset and size in bytes of its content, in order.

    ``file`` may be moved between two of them. Raises ``ValueError`` saying at which byte the archive is damaged or truncated,
    and for sparse files, whose content is not in one piece.
    """
    length = os.fstat(file.fileno()).st_size
    position, path, longer = 0, None, None
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if header == _END:
            return
        start = position + BLOCK
        if len(header) < BLOCK:
            raise ValueError(f"truncated at byte {position}: the end of the archive is missing")
        try:
            sound = _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * ord(" ")
            size = _number(header[124:136])
        except ValueError:
            sound, size = False, 0
        if not sound:
            raise ValueError(f"damaged at byte {position}: that is not the header of a file")
        kind = header[156:157]
        if kind in _WITHOUT_CONTENT:
            size = 0
        elif kind not in (b"L", b"K", b"x", b"X", b"g") and longer is not None:
            size = longer
        if start + size > length:
            raise ValueError(f"truncated: the file at byte {position} is longer than the rest of the archive")
        position = start + -(-size // BLOCK) * BLOCK
        if kind == b"L":
            path = _extension(file, size).partition(b"\0")[0]
        elif kind in (b"x", b"X", b"g"):
            records = _records(_extension(file, size), start)
            if any(key.startswith(b"GNU.sparse") for key in records) or (kind == b"g" and {b"path", b"size"} & records.keys()):
                raise ValueError(f"the extended header at byte {start} is of a sparse file, or names all files alike")
            if kind != b"g":
                path = records.get(b"path", path)
                longer = int(records[b"size"]) if b"size" in records else longer
        elif kind == b"S":
            raise ValueError(f"the file at byte {start} is sparse, and cannot be read by offset")
        elif kind != b"K":
            name = _name(header) if path is None else path
            if kind in _REGULAR and not name.endswith(b"/"):
                yield name.decode("utf-8", "surrogateescape"), (start, size)
            path, longer = None, None


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    # GNU tar's own format ("ustar" and a space) keeps times where POSIX has the prefix.
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _number(field: bytes) -> int:
    """An octal number, or GNU tar's binary one for sizes of 8 GiB and more."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    value = int(field.partition(b"\0")[0].strip() or b"0", 8)
    if value < 0:
        raise ValueError
    return value


def _extension(file: IO[bytes], size: int) -> bytes:
    if size > _LONGEST_EXTENSION:
        raise ValueError(f"an extended header has {size} bytes, more than {_LONGEST_EXTENSION}")
    return file.read(size)  # it follows the header, where the file now stands


def _records(content: bytes, start: int) -> dict[bytes, bytes]:
    """The ``LENGTH KEY=VALUE`` lines of a pax header."""
    records, place = {}, 0
    while place < len(content):
        digits = content[place : max(place, content.find(b" ", place, place + 20))]
        if not digits.isdigit() or not len(digits) + 2 < int(digits) <= len(content) - place:
            raise ValueError(f"damaged at byte {start}: not a pax header")
        key, _, value = content[place + len(digits) + 1 : place + int(digits) - 1].partition(b"=")
        records[key] = value
        place += int(digits)
    if not records.get(b"size", b"0").isdigit():
        raise ValueError(f"damaged at byte {start}: a pax size that is not a number")
    return records
