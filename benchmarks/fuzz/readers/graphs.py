"""Readers of ONNX files, with and without external data."""

from __future__ import annotations

from pathlib import Path
from random import Random

from benchmarks.fuzz import seeds
from benchmarks.fuzz.mutators import mutate_bytes, mutate_message
from benchmarks.fuzz.target import Files, Target


def mutated_onnx(rng: Random, data: bytes) -> bytes:
    import onnx

    if rng.random() < 0.3:
        return mutate_bytes(rng, data, [data])
    model = onnx.ModelProto()
    model.ParseFromString(data)
    mutate_message(rng, model)
    changed = bytes(model.SerializeToString())
    return mutate_bytes(rng, changed) if rng.random() < 0.05 else changed


def _onnx(rng: Random) -> Files:
    return {"model.onnx": mutated_onnx(rng, seeds.vit())}


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


TARGETS: tuple[Target, ...] = (
    Target("ONNX: read_model", 50_000, lambda: {"model.onnx": seeds.vit()}, _onnx, _read_model),
    Target("ONNX: external data", 35_000, lambda: dict(seeds.external_vit()), _external, _read_model),
    Target("ONNX: load_model", 5_000, lambda: {"model.onnx": seeds.vit()}, _onnx, _load_model),
    Target("ONNX: check_onnx", 20_000, lambda: {"model.onnx": seeds.vit()}, _onnx, _check_onnx),
)
