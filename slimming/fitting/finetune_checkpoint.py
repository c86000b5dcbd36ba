"""What a fine-tuning run leaves as it found it, and its checkpoints: whole folders that know which run they belong to."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from patchslim.errors import InputRejected
from patchslim.files import digest, read_bounded
from slimming.data.source import Samples
from slimming.models.checkpoint import SizedReader, first_line

_RUN = "run.json"
_DIGESTS = "digests.json"  # of every other file of a checkpoint
_STATES = "states.pt"  # of what Accelerate does not know
_MOST_BYTES = 8 << 20  # of either JSON file
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


class Stateful(Protocol):
    """What goes on from where it was: an average of weights, a schedule."""

    def state_dict(self) -> dict[str, Any]:
        """Its state: tensors, numbers, strings, and lists and dicts of them."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Go on from ``state``."""


def save(accelerator: Accelerator, folder: Path, parts: dict[str, Any], step: int, states: Mapping[str, Stateful]) -> None:
    """Write the state after ``step`` as ``folder/step-N``, then remove the one before: at every moment one of them is whole.

    ``states`` are what Accelerate does not know of. Every process calls it and adds its own generators' state; the first one
    writes everything else.
    """
    part = folder / f".step-{step}.part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.save({name: state.state_dict() for name, state in states.items()}, part / _STATES)
        (part / _RUN).write_text(json.dumps(parts, indent=1), encoding="utf-8")
        names = sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())
        (part / _DIGESTS).write_text(json.dumps({name: digest(part / name) for name in names}, indent=1), encoding="utf-8")
        part.replace(folder / f"step-{step}")
        for old, path in _saved(folder):
            if old != step:
                shutil.rmtree(path)


def resume(accelerator: Accelerator, folder: Path, parts: dict[str, Any], states: Mapping[str, Stateful]) -> None:
    """Load the newest state in ``folder``, if there is one.

    Nothing in it is run: only tensors, numbers and text are taken from its pickles. Raises ``InputRejected`` when ``folder`` is
    none, when a file of the state is missing, changed or cannot be read, and when the state is of a run whose ``parts`` differ.
    """
    if folder.exists() and not folder.is_dir():
        raise InputRejected(f"{folder}: not a folder of checkpoints")
    saved = _saved(folder)
    if not saved:
        return
    path = saved[-1][1]
    differences = list(_differences(_read_json(path, _RUN), json.loads(json.dumps(parts))))
    if differences:
        raise InputRejected(f"{path}: is of another run: {'; '.join(differences)}; give another folder, or remove this one")
    _check_files(path)
    try:
        accelerator.load_state(str(path))
        with SizedReader(FileIO(path / _STATES)) as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
        for name, state in states.items():
            state.load_state_dict(found[name])
    except Exception as error:  # on damaged bytes PyTorch's unpickler raises whatever its stack machine runs into
        raise InputRejected(f"{path}: a damaged checkpoint: {first_line(error)}; remove it to start again") from error
    accelerator.wait_for_everyone()


def _read_json(path: Path, name: str) -> object:
    try:
        return json.loads(read_bounded(path / name, _MOST_BYTES, "fine-tuning checkpoint"))
    except (ValueError, RecursionError) as error:
        fault = f"{path / name}: cannot be read as a checkpoint: {first_line(error)}; remove {path} to start again"
        raise InputRejected(fault) from error
    except InputRejected as error:
        raise InputRejected(f"{error}; remove {path} to start again") from error


def _check_files(path: Path) -> None:
    """Raise ``InputRejected`` unless the files in ``path`` are those that were written, byte by byte.

    Accelerate would take a damaged generator's state for none, and go on with other images.
    """
    recorded = _read_json(path, _DIGESTS)
    try:
        found = {
            file.relative_to(path).as_posix(): digest(file)
            for file in path.rglob("*")
            if file.is_file() and file.name != _DIGESTS
        }
        pickles = [file for file in path.iterdir() if file.suffix in (".bin", ".pkl", ".pt")]
        old = next((file.name for file in pickles if not _is_archive(file)), None)
    except OSError as error:
        raise InputRejected(f"{path}: a damaged checkpoint: {error}; remove it to start again") from error
    if recorded != found:
        names = recorded if isinstance(recorded, dict) else {}
        changed = min((name for name in {*names, *found} if names.get(name) != found.get(name)), default=_DIGESTS)
        raise InputRejected(f"{path}: a damaged checkpoint: {changed} is not as it was written; remove it to start again")
    if old is not None:  # PyTorch's older format, which reserves whatever length it reads
        raise InputRejected(f"{path}: a damaged checkpoint: {old} is no archive of tensors; remove it to start again")


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


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
