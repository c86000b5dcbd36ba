"""Readers of images: single ones, WebDataset shards, and what lies beside them."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from random import Random

from benchmarks.fuzz import seeds
from benchmarks.fuzz.bundles import PREPROCESSING
from benchmarks.fuzz.mutators import mutate_bytes, mutate_json
from benchmarks.fuzz.target import Files, Target

#: Fields of a tar header: where each starts, and its length.
_PLACES = ((0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (156, 1), (157, 100), (257, 8), (345, 155), (512, 512))
#: Sizes, kinds and names of members, and a record of a pax header.
_FIELDS = (
    *(
        b"0",
        b"7777777777",
        b"-1",
        b"99",
        b"\x80" + bytes(10) + b"\x01",
        b"\x80" + b"\xff" * 11,
        b"L",
        b"x",
        b"S",
        b"g",
        b"5",
        b"1",
        b"K",
    ),
    *(b"a/../b.png", b"0000.cls", b"29 size=99999999\n", b"9 size=1\n"),
)


def _tar(rng: Random) -> Files:
    """An archive whose headers are mutated, mostly under a right checksum."""
    archives = seeds.shards()
    data = bytearray(rng.choice(archives))
    if rng.random() < 0.2:
        return {"train-0.tar": mutate_bytes(rng, bytes(data), archives)}
    heads = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice(heads)
        place, width = rng.choice(_PLACES)
        there = bytes(data[at + place : at + place + width])
        faults = (rng.randbytes(width), b"\xff" * width, bytes(width), rng.choice(_FIELDS), mutate_bytes(rng, there))
        field = rng.choice(faults)[:width].ljust(width, b"\0")
        data[at + place : at + place + width] = field
        if rng.random() < 0.9:
            head = data[at : at + 512]
            total = sum(head) - sum(head[148:156]) + 8 * ord(" ")
            data[at + 148 : at + 156] = f"{total:06o}\0 ".encode()
    return {"train-0.tar": bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)}


def _read_tar(folder: Path) -> object:
    from slimming.data.tar_headers import regular_files

    with (folder / "train-0.tar").open("rb") as file:
        return list(regular_files(file))


def _read_shard(folder: Path) -> object:
    from slimming.data.shards import ShardReader

    found = []
    for label in ("", "a/b"):
        reader = ShardReader([folder / "train-0.tar"], label)
        found += [(reader[index], reader.filename(index)) for index in range(len(reader))]
    return found


_SPLITS = json.dumps(
    {
        "splits": {
            name: {"filenames": [f"{name}-0.tar"], "alt_label": "label", "num_samples": 2} for name in ("train", "validation")
        }
    }
)


def _splits(rng: Random) -> Files:
    return {"_info.json": mutate_json(rng, _SPLITS), "train-0.tar": b""}


def _read_splits(folder: Path) -> object:
    from slimming.data.shards import shards_of

    return shards_of(folder, "train")


def _image(rng: Random, folder: str) -> Files:
    suffix, data = rng.choice(seeds.images())
    if suffix == "png" and rng.random() < 0.5:
        data = _mutated_png(rng, data)
    elif rng.random() < 0.2:  # sizes stand near the start
        data = mutate_bytes(rng, data[:64]) + data[64:]
    else:
        data = mutate_bytes(rng, data, [other for _, other in seeds.images()])
    return {f"{folder}/0.{suffix}": data}


def _mutated_png(rng: Random, data: bytes) -> bytes:
    """A picture with a chunk mutated, left out or twice, under right checksums; its size may be anything."""
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    which = rng.randrange(len(chunks))
    kind, content = chunks[which]
    if kind == b"IHDR" and rng.random() < 0.7:
        sides = [rng.choice((0, 1, 10, 12, 1000, 9000, 13_000, 40_000, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
        content = struct.pack(">II", *sides) + mutate_bytes(rng, content[8:])[:5].ljust(5, b"\0")
    elif rng.random() < 0.2:
        content = zlib.compress(bytes(rng.choice((0, 10, 10**6))))
    else:
        content = mutate_bytes(rng, content)
    chunks[which] = (
        rng.choice((kind, kind, kind, b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"PLTE", b"tRNS", b"acTL", b"fdAT", b"iCCP")),
        content,
    )
    if rng.random() < 0.1:
        chunks.insert(rng.randrange(len(chunks)), chunks[which])
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _read_image(folder: Path) -> object:
    from validate.images import batches

    (path,) = (folder / "images").iterdir()
    return list(batches([(path, 0)], PREPROCESSING, 1))


def _read_sample(folder: Path) -> object:
    from slimming.data.source import calibration_set

    images = calibration_set(str(folder / "set"), 1, apart=True)
    return [images.samples[index] for index in images.indices]


def _valid_image(folder: str) -> Files:
    suffix, data = seeds.images()[0]
    return {f"{folder}/0.{suffix}": data}


TARGETS: tuple[Target, ...] = (
    Target("tar headers", 90_000, lambda: {"train-0.tar": seeds.shards()[0]}, _tar, _read_tar, (ValueError,)),
    Target("WebDataset shards", 12_000, lambda: {"train-0.tar": seeds.shards()[0]}, _tar, _read_shard),
    Target(
        "WebDataset _info.json", 40_000, lambda: {"_info.json": _SPLITS.encode(), "train-0.tar": b""}, _splits, _read_splits
    ),
    Target("images: validate", 5_000, lambda: _valid_image("images"), lambda rng: _image(rng, "images"), _read_image),
    Target("images: slimming", 2_700, lambda: _valid_image("set/a"), lambda rng: _image(rng, "set/a"), _read_sample),
)
