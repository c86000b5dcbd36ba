"""The reader of a fine-tuning's checkpoints: folders of safetensors, pickles and JSON, mostly sealed again after a fault."""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import seeds
from benchmarks.fuzz.mutators import mutate_bytes, mutate_json
from benchmarks.fuzz.target import Files, Target

_PARTS = {"recipe": {"epochs": 1.0, "lr": 0.001, "precision": "no"}, "weights": "0" * 64, "teacher": None, "processes": 1}
_STEP = "run/step-1"


@cache
def _run() -> tuple[Any, dict[str, Any]]:
    """A run of one layer: its Accelerator, and the states that this does not know of."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    set_seed(0)  # a checkpoint holds the generators' states, and an input is the same in every process
    layer = torch.nn.Linear(2, 2)
    accelerator = Accelerator(cpu=True)
    optimizer = create_optimizer_v2(layer, "adamw", lr=1e-3)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=3, min_lr=1e-5)
    wrapped, optimizer = accelerator.prepare(layer, optimizer)
    wrapped(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return accelerator, {"average": ModelEmaV3(layer), "schedule": schedule}


@cache
def _checkpoint() -> Files:
    from accelerate.utils import set_seed

    from slimming.fitting.finetune_checkpoint import save

    accelerator, states = _run()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save(accelerator, Path(folder), _PARTS, 1, states)
        step = Path(folder) / "step-1"
        return {f"{_STEP}/{path.name}": path.read_bytes() for path in sorted(step.iterdir())}


def _mutated(rng: Random) -> Files:
    files = dict(_checkpoint())
    name = rng.choice(sorted(files))
    data = files[name]
    if name.endswith(".json"):
        files[name] = mutate_json(rng, data.decode())
    elif data[:2] != b"PK" or rng.random() < 0.2:
        files[name] = mutate_bytes(rng, data)
    else:
        members = seeds.unzipped(data)
        pickled = [at for at, member in enumerate(members) if member.name.endswith("data.pkl")]
        at = rng.choice(pickled) if rng.random() < 0.8 else rng.randrange(len(members))
        members[at] = seeds.Member(members[at].name, mutate_bytes(rng, members[at].data))
        files[name] = seeds.zipped(members)
    if rng.random() < 0.05:
        del files[rng.choice(sorted(files))]
    digests = f"{_STEP}/digests.json"
    if name != digests and rng.random() < 0.9:
        sealed = {Path(file).name: hashlib.sha256(files[file]).hexdigest() for file in files if file != digests}
        files[digests] = json.dumps(sealed).encode()
    return files


def _resume(folder: Path) -> object:
    from slimming.fitting.finetune_checkpoint import resume

    accelerator, states = _run()
    resume(accelerator, folder / "run", _PARTS, states)
    return states


TARGETS: tuple[Target, ...] = (Target("fine-tuning checkpoints", 4_000, lambda: dict(_checkpoint()), _mutated, _resume),)
