"""Readers of folders and of what is in them: bundles, engine files, stages of the work folder."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from random import Random

from benchmarks.fuzz import seeds
from benchmarks.fuzz.mutators import mutate_bytes, mutate_json
from benchmarks.fuzz.readers.arrays import mutated_archive, mutated_arrays
from benchmarks.fuzz.readers.graphs import mutated_onnx
from benchmarks.fuzz.target import Files, Target
from patchslim.errors import InputRejected


def _bundle(rng: Random) -> Files:
    """A bundle with one file mutated, mostly sealed again, so that more than its digests is looked at."""
    files = dict(seeds.bundle())
    name = rng.choice(sorted(files))
    if name == "manifest.json":
        return files | {name: mutate_json(rng, files[name].decode())}
    if name == "golden.npz":
        changed = rng.choice((mutated_archive, mutated_arrays))(rng)[name]
    elif name.endswith(".onnx"):
        changed = mutated_onnx(rng, files[name])
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


_ENGINE = b"vtrt" + bytes(4) + (2).to_bytes(8, "little") + (64).to_bytes(8, "little") + bytes(40)


def _engine(rng: Random) -> Files:
    """An engine file with faults, most of them in the part of it that has a meaning."""
    size = rng.choice((24, 24, 24, 64))
    return {"model.engine": mutate_bytes(rng, _ENGINE[:size], [_ENGINE]) + _ENGINE[size:]}


def _read_engine(folder: Path) -> object:
    from validate.engine_file import check_engine

    for backend in ("tensorrt-rtx", "tensorrt", "onnxruntime"):
        check_engine(folder / "model.engine", backend)
    return None


_STAGE = "work/dense-00112233445566778899"


def _stage_of(files: Files) -> Files:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return {f"{_STAGE}/{name}": data for name, data in (files | {"digests.json": json.dumps(digests).encode()}).items()}


@cache
def _valid_stage() -> Files:
    return _stage_of({"model.onnx": b"graph", "parts/logits.npy": b"array"})


def _stage(rng: Random) -> Files:
    """A stage of the work folder whose digests, or whose files, are wrong."""
    files = dict(_valid_stage())
    name = f"{_STAGE}/digests.json" if rng.random() < 0.9 else rng.choice(sorted(files))
    changed = mutate_json(rng, files[name].decode()) if name.endswith(".json") else mutate_bytes(rng, files[name])
    return files | {name: changed}


def _read_stage(folder: Path) -> object:
    """A damaged stage is removed and made anew; what is read of a whole one is compared once more."""
    from export.cache import StageCache, recorded_digest

    cache, stage = StageCache(folder / "work"), folder / _STAGE
    recorded_digest(stage / "model.onnx")
    return cache.read(stage / "model.onnx") if cache.has(stage) else None


TARGETS: tuple[Target, ...] = (
    Target("bundles: check_bundle", 150, lambda: dict(seeds.bundle()), _bundle, _check_bundle),
    Target("engine headers", 40_000, lambda: {"model.engine": _ENGINE}, _engine, _read_engine, (InputRejected,)),
    Target("digests.json of a stage", 20_000, lambda: dict(_valid_stage()), _stage, _read_stage),
)
