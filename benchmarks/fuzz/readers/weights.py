"""Readers of weights: safetensors, pickles, folders of ``save_pretrained``, and checkpoints of a fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from benchmarks.fuzz import seeds
from benchmarks.fuzz.mutators import mutate_bytes, mutate_json
from benchmarks.fuzz.target import Files, Target


def _valid_safetensors() -> bytes:
    header, data = seeds.safetensors_header()
    return seeds.safetensors(header.encode(), data)


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


TARGETS: tuple[Target, ...] = (
    Target(
        "weights: safetensors", 35_000, lambda: {"model.safetensors": _valid_safetensors()}, _safetensors, _read_safetensors
    ),
    Target("weights: .pth", 15_000, lambda: {"model.pth": seeds.checkpoints()[0]}, _checkpoint, _read_checkpoint),
    Target("weights: config.json", 20_150, lambda: _saved(_CONFIG.encode()), _config, _read_saved),
)
