"""Checkpoints as people have them: of timm, DeiT, MAE, Lightning and Hugging Face, read without running what is in them."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchslim.errors import InputRejected
from patchslim.files import read_bounded

if TYPE_CHECKING:
    from torch import Tensor

#: Names under which trainers keep a state dict: the running average of the weights, and the weights themselves.
AVERAGED = ("state_dict_ema", "model_ema")
PLAIN = ("state_dict", "model")
#: What wrappers put before every name: DDP and EMA, Lightning and HF trainers, transformers' TimmWrapper.
WRAPPERS = ("module.", "model.", "timm_model.")
#: What ``torch.compile`` puts into names, before all of them or within.
COMPILED = "_orig_mod."
SAVED_NAMES = ("model.safetensors", "pytorch_model.bin")
"""Files that timm's and Hugging Face's ``save_pretrained`` write, with a ``config.json`` beside."""
_MAX_CONFIG_BYTES = 4 << 20
_DATA_CONFIG = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_NESTING = 4  # state dicts within dicts
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
#: Types that savers keep beside the weights. They are read as ``_Ignored``: nothing of theirs is made, run or kept.
HARMLESS = (
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"numpy.{module}.multiarray.scalar" for module in ("core", "_core")),
    "numpy.dtype",
)


class _Ignored:
    """Stands for an object of a type in ``HARMLESS``; takes whatever a pickle gives it and keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        return


@dataclass(frozen=True)
class SavedConfig:
    """What a ``config.json`` of timm or Hugging Face says of the weights beside it."""

    path: Path
    architecture: str = ""  # timm's name; "" where the model is not timm's
    arguments: dict[str, Any] = field(default_factory=dict)  # for timm.create_model
    data_config: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A state dict on the CPU, and all that its file says of it."""

    path: Path  # the file, where a folder was given the one in it
    state: dict[str, Tensor]
    source: str  # the file's name, and which weights of it where it holds several
    record: dict[str, Any]  # what a file of ours or a config.json says: data_config, labels; else empty
    config: SavedConfig | None
    notes: tuple[str, ...]  # what a user is to be told


def weights_file(path: Path) -> Path:
    """Return ``path``, or the weights in it where it is a folder that ``save_pretrained`` wrote. Raises ``InputRejected``."""
    if not path.is_dir():
        return path
    for name in SAVED_NAMES:
        if (path / name).is_file():
            return path / name
    if parts := sorted(path.glob("*.index.json")):
        raise InputRejected(f"{parts[0]}: weights in several files: save them as one, save_pretrained(max_shard_size='100GB')")
    raise InputRejected(f"{path}: no such weights file: it is a folder without {' or '.join(SAVED_NAMES)}")


def read_labels(path: Path) -> list[str]:
    """Return the class names that a weights file, or the ``config.json`` beside it, gives; empty where neither does.

    No tensor is read. Raises ``InputRejected`` where the file cannot be.
    """
    file = weights_file(path)
    record = _own_record(file) if file.suffix == ".safetensors" and file.is_file() else {}
    config = _config_beside(file)
    return _names(record.get("labels")) or (config.labels if config else [])


def read_checkpoint(path: Path, *, ema: bool = False) -> Checkpoint:
    """Read a safetensors file, a PyTorch pickle (``weights_only``), or a folder of ``save_pretrained``.

    ``ema`` takes the running average that a trainer kept beside the weights. Wrappers' prefixes are taken off.
    Raises ``InputRejected`` naming the file, the fault and the next step.
    """
    import torch

    file = weights_file(path)
    if not file.is_file():
        raise InputRejected(f"{file}: no such weights file; --weights takes bundled, pretrained, random or a file")
    if file.stat().st_size == 0:
        raise InputRejected(f"{file}: the weights file is empty")
    safetensors = file.suffix == ".safetensors"
    record = _own_record(file) if safetensors else {}
    content: Any = _read_safetensors(file) if safetensors else _read_pickle(file)
    content, taken, notes = _chosen(content, ema, file)
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())
    ):
        raise InputRejected(f"{file}: holds no state dict of tensors")
    state, unwrapped = _unwrapped(content, file)
    for key, value in state.items():
        if fault := _tensor_fault(value):
            raise InputRejected(f"{file}: {key[:200]} {fault}")
    config = _config_beside(file)
    if config is not None:
        record = {"data_config": config.data_config, "labels": config.labels} | record
    name = f"{path.name}/{file.name}" if file != path else file.name
    source = f"{name} ({taken})" if taken else name
    return Checkpoint(file, state, source, record, config, (*notes, *unwrapped))


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:
        raise InputRejected(f"{file}: truncated or corrupt weights: {first_line(error)}") from error


def _own_record(file: Path) -> dict[str, Any]:
    """What a safetensors file of ours says of its own training."""
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            record = json.loads((opened.metadata() or {}).get("patchslim", "{}"))
    except Exception as error:
        raise InputRejected(f"{file}: truncated or corrupt weights: {first_line(error)}") from error
    if not isinstance(record, dict) or not isinstance(record.get("data_config", {}), dict):
        raise InputRejected(f"{file}: its training record is not a JSON object, or its data_config is not one")
    return record


def _read_pickle(file: Path) -> object:
    import torch

    allowed: list[Any] = [(_Ignored, name) for name in HARMLESS]
    try:
        with torch.serialization.safe_globals(allowed), SizedReader(FileIO(file)) as opened:
            return torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|[Uu]nsupported class|instantiate) ([\w.]{1,200})", str(error))
        fault = f"it holds a Python object of type {found[1]}" if found else first_line(error)
        raise InputRejected(
            f"{file}: not a plain weights pickle: {fault}, and loading such objects could run anything. Save the tensors alone "
            "where the file was made: from safetensors.torch import save_file; "
            'save_file(model.state_dict(), "weights.safetensors")'
        ) from error
    except Exception as error:  # on damaged bytes PyTorch's unpickler raises whatever its stack machine runs into
        raise InputRejected(f"{file}: truncated or corrupt weights: {first_line(error)}") from error


class SizedReader(BufferedReader):
    """A file that is never asked for more bytes than it has: PyTorch's unpickler trusts the lengths in it."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))


def _chosen(content: Any, ema: bool, file: Path) -> tuple[Any, str, list[str]]:
    """The innermost state dict that is asked for, its name where there was a choice, and what to say of that."""
    averaged = ""
    for _ in range(_NESTING):
        if not isinstance(content, dict):
            break
        plain = [name for name in PLAIN if isinstance(content.get(name), dict)]
        means = [name for name in AVERAGED if isinstance(content.get(name), dict) and content[name]]
        if means and (ema or not plain):
            averaged, content = means[0], content[means[0]]
            return _inner(content), averaged, [f"{file.name}: the EMA weights are taken ({averaged})"]
        if not plain:
            break
        if means:
            taken = f"{file.name}: the plain weights are taken ({plain[0]}); --ema takes the averaged ones ({means[0]})"
            return _inner(content[plain[0]]), plain[0], [taken]
        content = content[plain[0]]
    if ema:
        raise InputRejected(f"{file}: no EMA weights are in it ({' or '.join(AVERAGED)}): leave --ema out")
    return content, "", []


def _inner(content: Any) -> Any:
    for _ in range(_NESTING):
        inner = next((content[name] for name in PLAIN if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        content = inner
    return content


def _unwrapped(state: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` without what wrappers put before its names, in whatever order, and what to say of that."""
    found = {key.replace(COMPILED, ""): value for key, value in state.items() if key != "n_averaged"}
    if len(found) < len(state) - ("n_averaged" in state):
        raise InputRejected(f"{file}: holds the same weights with and without the prefix {COMPILED}: save one of them")
    notes = []
    while prefix := next((one for one in WRAPPERS if found and _wrapped(found, one)), ""):
        others = [key for key in found if not key.startswith(prefix)]
        if others:
            notes.append(f"{file.name}: {len(others)} tensor(s) outside {prefix} are left out ({', '.join(others[:4])}, ...)")
        found = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    return found, notes


def _wrapped(state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether ``prefix`` stands before all names, or before those of a ViT among others (Lightning keeps its losses beside)."""
    inner = "patch_embed.proj.weight"
    return all(key.startswith(prefix) for key in state) or (f"{prefix}{inner}" in state and inner not in state)


def _tensor_fault(value: Tensor) -> str:
    import torch

    if value.layout is not torch.strided or value.is_nested:
        return f"is no dense tensor ({str(value.layout).removeprefix('torch.')}): save it with .to_dense()"
    if value.device.type != "cpu":
        return f"has no values (it is on the device {value.device.type}): save the weights after they were loaded"
    if value.is_quantized or value.is_complex():
        return f"is of type {str(value.dtype).removeprefix('torch.')}: save floating-point weights"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return (
            f"claims {value.numel()} values, more than the file holds for it (an expanded tensor): save it with .contiguous()"
        )
    if value.is_floating_point() and not bool(value.float().isfinite().all()):
        return "holds NaN or Inf"
    return ""


def _config_beside(file: Path) -> SavedConfig | None:
    """The ``config.json`` beside weights of ``save_pretrained``; None where there is none, or it is of something else."""
    path = file.with_name("config.json")
    if file.name not in SAVED_NAMES or not path.is_file():
        return None
    try:
        content = json.loads(read_bounded(path, _MAX_CONFIG_BYTES, "model config"))
    except (ValueError, RecursionError) as error:
        raise InputRejected(f"{path}: not a model config: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputRejected(f"{path}: not a model config: no JSON object")
    given = content.get("pretrained_cfg")
    shown = given if isinstance(given, dict) else content
    labels = _names(content.get("label_names")) or _names(shown.get("label_names")) or _by_index(content.get("id2label"))
    architecture = content.get("architecture")
    if not isinstance(architecture, str):
        return SavedConfig(path, labels=labels) if "model_type" in content else None
    arguments = content.get("model_args")
    arguments = dict(arguments) if isinstance(arguments, dict) else {}
    classes = content.get("num_classes")
    if type(classes) is int:
        arguments["num_classes"] = classes
    if isinstance(content.get("global_pool"), str) and content["global_pool"]:
        arguments.setdefault("global_pool", content["global_pool"])
    data_config = {key: shown[key] for key in _DATA_CONFIG if shown.get(key) is not None}
    return SavedConfig(path, architecture, arguments, data_config, labels)


def _names(value: object) -> list[str]:
    return list(value) if isinstance(value, list) and value and all(isinstance(name, str) for name in value) else []


def _by_index(value: object) -> list[str]:
    """Names of Hugging Face's ``id2label``, unless they are its placeholders."""
    if not isinstance(value, dict):
        return []
    names = [value.get(str(index)) for index in range(len(value))]
    return [] if _names(names) == [f"LABEL_{index}" for index in range(len(names))] else _names(names)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, printable and short; its type where it has none."""
    lines = str(error).strip().splitlines()
    text = "".join(one if one.isprintable() else " " for one in re.sub(r"\x1b\[[0-9;]*m", "", lines[0]))[:300] if lines else ""
    return text or type(error).__name__
