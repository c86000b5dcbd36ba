"""The readers that are fuzzed: what each is given, how that is mutated, what reads it, and which errors its docstring names."""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import seeds
from benchmarks.fuzz.mutators import mutate_bytes, mutate_json, mutate_message
from patchslim.errors import PatchslimError

#: Relative paths and bytes of one input.
Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """One reader of files that may come from a stranger.

    ``share`` is its part of the inputs, ``valid`` gives files that it must read, ``make`` mutated ones, ``read`` reads those in
    a folder, and ``refusals`` are the errors that it may raise.
    """

    name: str
    share: float
    valid: Callable[[], Files]
    make: Callable[[Random], Files]
    read: Callable[[Path], object]
    refusals: tuple[type[Exception], ...] = (PatchslimError,)


@cache
def _text(record: Callable[[], Any]) -> str:
    return str(record().model_dump_json())


def _json(name: str, share: float, file: str, text: Callable[[], str], read: Callable[[Path], object]) -> Target:
    return Target(name, share, lambda: {file: text().encode()}, lambda rng: {file: mutate_json(rng, text())}, read)


def _plan(folder: Path) -> object:
    from patchslim.plan import load_plan

    return load_plan(folder / "plan.json")


def _latency_table(folder: Path) -> object:
    from patchslim.latency_table import load_table

    return load_table(folder / "latency_table.json")


def _manifest(folder: Path) -> object:
    from validate.bundle import load_manifest

    return load_manifest(folder)


def _parity(folder: Path) -> object:
    from validate.bundle import load_parity

    return load_parity(folder)


def _facts(folder: Path) -> object:
    """A fact of the work folder, which is found out again where it is damaged: there is nothing to refuse."""
    from export.cache import FactStore

    store = FactStore(folder)
    path = store.path("fact", [], number=1)
    (folder / "fact.json").replace(path)
    try:
        return store.recall("fact", lambda: 1, number=1)
    finally:
        path.unlink(missing_ok=True)


def _golden(folder: Path) -> object:
    from validate.golden import read_golden

    return read_golden(folder / "golden.npz", (3, seeds.SIDE, seeds.SIDE), seeds.CLASSES)


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


def _npz_bytes(rng: Random) -> Files:
    data = seeds.bundle()["golden.npz"]
    if rng.random() < 0.6:  # where the archive keeps its structure: the start of each member and the directory at the end
        cut = rng.choice((60, len(data) - 400))
        return {"golden.npz": data[:cut] + mutate_bytes(rng, data[cut:])}
    return {"golden.npz": mutate_bytes(rng, data)}


def _npz_arrays(rng: Random) -> Files:
    return {"golden.npz": _mutated_zip(rng, seeds.bundle()["golden.npz"], lambda data: _mutated_npy(rng, data))}


def _mutated_onnx(rng: Random, data: bytes) -> bytes:
    import onnx

    if rng.random() < 0.3:
        return mutate_bytes(rng, data, [data])
    model = onnx.ModelProto()
    model.ParseFromString(data)
    mutate_message(rng, model)
    changed = bytes(model.SerializeToString())
    return mutate_bytes(rng, changed) if rng.random() < 0.05 else changed


def _onnx(rng: Random) -> Files:
    return {"model.onnx": _mutated_onnx(rng, seeds.vit())}


def _read_model(folder: Path) -> object:
    from graph_passes.onnx_io.files import read_model

    return [weight.load() for weight in read_model(folder / "model.onnx").weights.values()]


def _load_model(folder: Path) -> object:
    from graph_passes import load_model

    return load_model(folder / "model.onnx")


def _check_onnx(folder: Path) -> object:
    from validate.onnx_file import check_onnx

    check_onnx(folder / "model.onnx", {"model.data"})
    return None


#: Locations, offsets and lengths of external data.
_ENTRIES = (
    *(
        "",
        ".",
        "..",
        "/",
        "../x",
        "model.onnx",
        "MODEL.DATA",
        "model.data/",
        "./model.data",
        "a\0b",
        "~",
        "/dev/zero",
        "x" * 5000,
    ),
    *("0", "-1", "1", "7", "1e3", "0x10", " 4 ", "1_0", "٣", str(2**63), str(-(2**64)), "9" * 5000, "4096", "nan", "é"),
)


def _external(rng: Random) -> Files:
    import onnx

    files = dict(seeds.external_vit())
    if rng.random() < 0.1:
        return files | {"model.data": mutate_bytes(rng, files["model.data"])}
    model = onnx.ModelProto()
    model.ParseFromString(files["model.onnx"])
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    for _ in range(rng.choice((1, 1, 2, 3))):
        tensor = rng.choice(tensors)
        kind = rng.randrange(8)
        if kind == 0:
            tensor.external_data.add(key=rng.choice(("location", "offset", "length", "checksum", "")), value="0")
        elif kind == 1 and tensor.external_data:
            del tensor.external_data[rng.randrange(len(tensor.external_data))]
        elif kind == 2:
            tensor.dims.append(rng.choice((0, 1, 2, -1, 2**40, 2**62)))
        elif kind == 3:
            tensor.data_type = rng.choice((*range(30), -1, 2**31 - 1))
        elif kind == 4:
            tensor.raw_data = bytes(rng.choice((0, 1, 32, 2000)))
        elif tensor.external_data:
            rng.choice(tensor.external_data).value = rng.choice(_ENTRIES)
    changed = bytes(model.SerializeToString())
    return files | {"model.onnx": mutate_bytes(rng, changed) if rng.random() < 0.1 else changed}


def _safetensors(rng: Random) -> Files:
    header, data = seeds.safetensors_header()
    if rng.random() < 0.25:
        return {"model.safetensors": mutate_bytes(rng, seeds.safetensors(header.encode(), data))}
    if rng.random() < 0.2:  # the record that a file of ours has beside its tensors
        parts = json.loads(header)
        record = mutate_json(rng, parts["__metadata__"]["patchslim"])
        parts["__metadata__"]["patchslim"] = record.decode("utf-8", "replace")
        return {"model.safetensors": seeds.safetensors(json.dumps(parts).encode(), data)}
    return {"model.safetensors": seeds.safetensors(mutate_json(rng, header), data)}


def _read_safetensors(folder: Path) -> object:
    from slimming.models.checkpoint import read_checkpoint

    return read_checkpoint(folder / "model.safetensors")


_CONFIG = json.dumps(
    {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 2,
        "model_args": {"img_size": 32, "depth": 2},
        "label_names": ["ant", "bee"],
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9,
                           "interpolation": "bicubic", "crop_mode": "center", "num_classes": 2, "label_names": ["ant", "bee"]},
        "id2label": {"0": "ant", "1": "bee"},
        "model_type": "vit",
    }
)  # fmt: skip


def _saved(config: bytes) -> Files:
    """A folder as ``save_pretrained`` writes it."""
    return {"config.json": config, "model.safetensors": _valid_safetensors()}


def _config(rng: Random) -> Files:
    return _saved(mutate_json(rng, _CONFIG))


def _read_saved(folder: Path) -> object:
    from slimming.models.checkpoint import read_checkpoint, read_labels

    return read_labels(folder), read_checkpoint(folder)


def _checkpoint(rng: Random) -> Files:
    data = rng.choice(seeds.checkpoints())
    if data[:2] != b"PK" or rng.random() < 0.2:
        return {"model.pth": mutate_bytes(rng, data, seeds.checkpoints())}
    members = seeds.unzipped(data)
    pickled = [at for at, member in enumerate(members) if member.name.endswith("data.pkl")]
    at = rng.choice(pickled) if rng.random() < 0.8 else rng.randrange(len(members))
    members[at] = seeds.Member(members[at].name, mutate_bytes(rng, members[at].data))
    return {"model.pth": seeds.zipped(members)}


def _read_checkpoint(folder: Path) -> object:
    from slimming.models.checkpoint import read_checkpoint

    return read_checkpoint(folder / "model.pth")


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
    return list(batches([(path, 0)], seeds.PREPROCESSING, 1))


def _read_sample(folder: Path) -> object:
    from slimming.data.source import calibration_set

    images = calibration_set(str(folder / "set"), 1, apart=True)
    return [images.samples[index] for index in images.indices]


def _valid_image(folder: str) -> Files:
    suffix, data = seeds.images()[0]
    return {f"{folder}/0.{suffix}": data}


def _bundle(rng: Random) -> Files:
    """A bundle with one file mutated, mostly sealed again, so that more than its digests is looked at."""
    files = dict(seeds.bundle())
    name = rng.choice(sorted(files))
    if name == "manifest.json":
        return files | {name: mutate_json(rng, files[name].decode())}
    if name == "golden.npz":
        changed = rng.choice((_npz_bytes, _npz_arrays))(rng)[name]
    elif name == "model.onnx":
        changed = _mutated_onnx(rng, files[name])
    elif name.endswith(".png"):
        changed = mutate_bytes(rng, files[name])
    else:
        changed = mutate_json(rng, files[name].decode())
    files[name] = changed
    return seeds.sealed(files) if rng.random() < 0.9 else files


def _check_bundle(folder: Path) -> object:
    from validate import check_bundle

    verdict = check_bundle(folder)
    verdict.raise_if_failed()
    return verdict


_VALID_FACT = json.dumps({"value": {"digest": "0" * 64, "sizes": [1, 2, 3], "share": 0.5}})

TARGETS: tuple[Target, ...] = (
    _json("plan.json", 180_000, "plan.json", lambda: _text(seeds.plan), _plan),
    _json("latency_table.json", 120_000, "latency_table.json", lambda: _text(seeds.latency_table), _latency_table),
    _json("manifest.json", 110_000, "manifest.json", lambda: seeds.bundle()["manifest.json"].decode(), _manifest),
    _json("parity.json", 120_000, "parity.json", lambda: seeds.bundle()["parity.json"].decode(), _parity),
    _json("facts of the work folder", 60_000, "fact.json", lambda: _VALID_FACT, _facts),
    Target("golden.npz: archive", 25_000, lambda: {"golden.npz": seeds.bundle()["golden.npz"]}, _npz_bytes, _golden),
    Target("golden.npz: arrays", 30_000, lambda: {"golden.npz": seeds.bundle()["golden.npz"]}, _npz_arrays, _golden),
    Target("ONNX: read_model", 50_000, lambda: {"model.onnx": seeds.vit()}, _onnx, _read_model),
    Target("ONNX: external data", 35_000, lambda: dict(seeds.external_vit()), _external, _read_model),
    Target("ONNX: load_model", 5_000, lambda: {"model.onnx": seeds.vit()}, _onnx, _load_model),
    Target("ONNX: check_onnx", 20_000, lambda: {"model.onnx": seeds.vit()}, _onnx, _check_onnx),
    Target(
        "weights: safetensors", 35_000, lambda: {"model.safetensors": _valid_safetensors()}, _safetensors, _read_safetensors
    ),
    Target("weights: .pth", 15_000, lambda: {"model.pth": seeds.checkpoints()[0]}, _checkpoint, _read_checkpoint),
    Target("weights: config.json", 20_150, lambda: _saved(_CONFIG.encode()), _config, _read_saved),
    Target("tar headers", 115_000, lambda: {"train-0.tar": seeds.shards()[0]}, _tar, _read_tar, (ValueError,)),
    Target("WebDataset shards", 12_000, lambda: {"train-0.tar": seeds.shards()[0]}, _tar, _read_shard),
    Target(
        "WebDataset _info.json", 40_000, lambda: {"_info.json": _SPLITS.encode(), "train-0.tar": b""}, _splits, _read_splits
    ),
    Target("images: validate", 5_000, lambda: _valid_image("images"), lambda rng: _image(rng, "images"), _read_image),
    Target("images: slimming", 2_700, lambda: _valid_image("set/a"), lambda rng: _image(rng, "set/a"), _read_sample),
    Target("bundles: check_bundle", 150, lambda: dict(seeds.bundle()), _bundle, _check_bundle),
)


def _valid_safetensors() -> bytes:
    header, data = seeds.safetensors_header()
    return seeds.safetensors(header.encode(), data)


def counts(targets: tuple[Target, ...], inputs: int) -> dict[str, int]:
    """How many inputs each reader gets: its share of ``inputs``, at least one; the first takes what rounding leaves."""
    total = math.fsum(target.share for target in targets)
    found = {target.name: max(1, int(inputs * target.share / total)) for target in targets}
    found[targets[0].name] += max(0, inputs - sum(found.values()))
    return found
