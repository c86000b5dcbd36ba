"""What a fine-tuning run leaves as it found it, and its checkpoints: whole folders that know which run they belong to."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from patchslim.errors import InputRejected
from slimming.data.source import Samples

_RUN = "run.json"
_STEP = re.compile(r"step-(\d+)")


@contextlib.contextmanager
def as_found(slim: nn.Module, teacher: nn.Module | None, samples: Samples) -> Iterator[None]:
    """Put back flags, modes, devices, the samples' transform and the global generators; ``slim``'s weights only on an error.

    Inside, the samples have no transform and the teacher needs no gradients.
    """
    modules = [module for top in (slim, teacher) if top is not None for module in top.modules()]
    modes = [module.training for module in modules]
    parameters = [parameter for top in (slim, teacher) if top is not None for parameter in top.parameters()]
    flags = [parameter.requires_grad for parameter in parameters]
    devices = [(top, next(top.parameters()).device) for top in (slim, teacher) if top is not None]
    weights = {name: value.detach().to("cpu", copy=True) for name, value in slim.state_dict().items()}
    transform = samples.transform
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    samples.transform = None
    if teacher is not None:
        teacher.requires_grad_(False)
    try:
        yield
    except BaseException:
        slim.load_state_dict(weights)
        raise
    finally:
        samples.transform = transform
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)
        for top, device in devices:
            top.to(device)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def save(accelerator: Accelerator, folder: Path, parts: dict[str, Any], step: int) -> None:
    """Write the state after ``step`` as ``folder/step-N``, then remove the one before: at every moment one of them is whole.

    Every process calls it and adds its own generators' state; the first one writes everything else.
    """
    part = folder / f".step-{step}.part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / _RUN).write_text(json.dumps(parts, indent=1), encoding="utf-8")
        part.replace(folder / f"step-{step}")
        for old, path in _saved(folder):
            if old != step:
                shutil.rmtree(path)


def resume(accelerator: Accelerator, folder: Path, parts: dict[str, Any]) -> None:
    """Load the newest state in ``folder``, if there is one.

    Raises ``InputRejected`` when ``folder`` is none, and when the state cannot be read or is of a run whose ``parts`` differ.
    """
    if folder.exists() and not folder.is_dir():
        raise InputRejected(f"{folder}: not a folder of checkpoints")
    saved = _saved(folder)
    if not saved:
        return
    path = saved[-1][1]
    try:
        found = json.loads((path / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputRejected(f"{path}: cannot be read as a checkpoint: {error}; remove it to start again") from error
    differences = list(_differences(found, json.loads(json.dumps(parts))))
    if differences:
        raise InputRejected(f"{path}: is of another run: {'; '.join(differences)}; give another folder, or remove this one")
    try:
        accelerator.load_state(str(path))
    except Exception as error:  # on damaged bytes PyTorch's unpickler raises whatever its stack machine runs into
        raise InputRejected(f"{path}: a damaged checkpoint: {error}; remove it to start again") from error
    accelerator.wait_for_everyone()


def _saved(folder: Path) -> list[tuple[int, Path]]:
    matches = [(_STEP.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _differences(there: object, here: object, name: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*here, *there]):
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
    elif there != here:
        yield f"{name} is {_short(there)} there and {_short(here)} here"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
