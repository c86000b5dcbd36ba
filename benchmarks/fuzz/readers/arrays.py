"""The reader of golden arrays: archives whose bytes, and arrays whose headers, are wrong."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from benchmarks.fuzz import seeds
from benchmarks.fuzz.bundles import CLASSES, SIZE
from benchmarks.fuzz.mutators import mutate_bytes
from benchmarks.fuzz.target import Files, Target


def _golden(folder: Path) -> object:
    from validate.golden import read_golden

    return read_golden(folder / "golden.npz", (3, SIZE, SIZE), CLASSES)


def _mutated_zip(rng: Random, data: bytes, mutate: Callable[[bytes], bytes]) -> bytes:
    """One member of an archive mutated under a right checksum; now and then a member too few, too many or of another name."""
    members = seeds.unzipped(data)
    at = rng.randrange(len(members))
    members[at] = seeds.Member(members[at].name, mutate(members[at].data))
    kind = rng.randrange(20)
    if kind == 0:
        del members[rng.randrange(len(members))]
    elif kind == 1:
        members.append(seeds.Member(rng.choice(("../x", "x.npy", members[0].name + "2")), b"x"))
    elif kind == 2:
        members[at] = seeds.Member(rng.choice(("/x", "a\\b", "é.npy")), members[at].data)
    compression = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    return seeds.zipped(members, compression)


_SHAPES = (
    *(
        "()",
        "(4,)",
        "(0, 6)",
        "(-1, 6)",
        "(4, 3, 8, 8)",
        "(4.0, 6)",
        f"({10**9}, 6)",
        f"({2**62}, 4)",
        "(True, 6)",
        "((4,), 6)",
    ),
    *("[4, 6]", "None", f"(1{'0' * 300},)", "(4, 3, 8, 8, 1)", "(" * 90 + ")" * 90, "'a'", "1e9"),
)
_DESCRS = (
    *(
        "'<f4'",
        "'<i8'",
        "'>f4'",
        "'|O'",
        "'<U9'",
        "'V0'",
        "'<f4,<f4'",
        "[('a', '<f4')]",
        "[('a', '<f4', (9, 9))]",
        "'S'",
        "None",
    ),
    *("'<M8[ns]'", "[]", "[('', '')]", "{'names': ['a']}", "'<f99'", "('<f4', (2,))", "-1"),
)
_HEADERS = (
    "{{'descr': {0}, 'fortran_order': {1}, 'shape': {2}, }}",
    "{{'descr': {0}, 'fortran_order': {1}, 'shape': {2}, 'x': 1}}",
    "{{'descr': {0}, 'shape': {2}}}",
    "[{0}, {1}, {2}]",
    "{{{2}: {0}}}",
)


def _mutated_npy(rng: Random, data: bytes) -> bytes:
    """An array whose header's text, version or length is wrong."""
    size = struct.unpack("<H", data[8:10])[0]
    header, values = data[10 : 10 + size].decode("latin-1"), data[10 + size :]
    kind = rng.randrange(6)
    if kind == 0:
        return mutate_bytes(rng, data[:200]) + data[200:]
    if kind == 1:
        header = mutate_bytes(rng, header.encode("latin-1")).decode("latin-1")
    else:
        text = rng.choice(_HEADERS)
        header = text.format(rng.choice(_DESCRS), rng.choice(("False", "True", "0", "None", "'x'")), rng.choice(_SHAPES))
    header = header + "\n"
    if kind == 2:
        values = values[: rng.randrange(len(values) + 1)]
    version = rng.choice((b"\x01\x00",) * 8 + (b"\x02\x00", b"\x03\x00", b"\x01\x01", b"\xff\x00"))
    length = struct.pack("<H", len(header) % 65536) if version[0] < 2 else struct.pack("<I", len(header))
    return data[:6] + version + length + header.encode("latin-1", "replace") + values


def mutated_archive(rng: Random) -> Files:
    data = seeds.bundle()["golden.npz"]
    if rng.random() < 0.6:  # where the archive keeps its structure: the start of each member and the directory at the end
        cut = rng.choice((60, len(data) - 400))
        return {"golden.npz": data[:cut] + mutate_bytes(rng, data[cut:])}
    return {"golden.npz": mutate_bytes(rng, data)}


def mutated_arrays(rng: Random) -> Files:
    return {"golden.npz": _mutated_zip(rng, seeds.bundle()["golden.npz"], lambda data: _mutated_npy(rng, data))}


TARGETS: tuple[Target, ...] = (
    Target("golden.npz: archive", 25_000, lambda: {"golden.npz": seeds.bundle()["golden.npz"]}, mutated_archive, _golden),
    Target("golden.npz: arrays", 30_000, lambda: {"golden.npz": seeds.bundle()["golden.npz"]}, mutated_arrays, _golden),
)
