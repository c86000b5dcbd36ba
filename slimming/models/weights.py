"""A state dict and the model that it is for: loaded, or refused with both sides' names and what the file looks like."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchslim.errors import InputRejected

if TYPE_CHECKING:
    from torch import Tensor, nn

_SHOWN = 12  # faults that a message lists
_PATCHES = "patch_embed.proj.weight"
_GRAPH = "export that model to ONNX and pass the file to python -m slimming.run --onnx"
#: Others' names, by a part of one of them: (what they are, the next step).
_FOREIGN = (
    (r"lora_[AB]|lora_(up|down)", "LoRA's", "merge the adapters first, model.merge_and_unload() in peft, and save the result"),
    (r"encoder\.layer\.\d+\.|embeddings\.cls_token", "Hugging Face's", _GRAPH),
    (r"encoder\.layers\.encoder_layer_\d+", "torchvision's", _GRAPH),
    (r"decoder_blocks\.\d+", "a masked autoencoder's before fine-tuning", "fine-tune it with a classifier head first"),
)


def apply_weights(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load ``state`` into ``module``. Raises ``InputRejected`` listing the tensors missing, unknown or of another shape."""
    expected = module.state_dict()
    if faults := _faults(state, expected):
        hints = "".join(f"\n{hint}" for hint in _hints(state, expected, module))
        raise InputRejected(f"{path}: these weights do not fit the model:\n  {_shown(faults)}{hints}")
    module.load_state_dict({key: state[key].to(expected[key].dtype) for key in expected})


def converted(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` under timm's names and for the model's own image size, where it is not so already; and what to say of that.

    By the converter of timm's own that belongs to the model's family: names of CLIP, DINOv2, I-JEPA, BEiT-3 and others, and a
    position embedding of another resolution. What it cannot make fit is given back as it is.
    """
    import torch

    expected = module.state_dict()
    same, family = dict(state), importlib.import_module(type(module).__module__)
    if not _faults(state, expected) or not hasattr(family, "checkpoint_filter_fn"):
        return same, []
    patches = state.get(_PATCHES)
    if patches is not None and patches.ndim == 4 and patches.shape != expected[_PATCHES].shape:
        return same, []  # timm would resample patches of another size too: that is another model
    try:
        with torch.inference_mode():
            found = {key: value.clone() for key, value in family.checkpoint_filter_fn(dict(state), module).items()}
    except Exception:
        return same, []
    if _faults(found, expected):
        return same, []
    notes = []
    before, after = state.get("pos_embed"), found.get("pos_embed")
    if before is not None and after is not None and before.shape != after.shape:
        notes.append(
            f"{path.name}: its position embedding of {before.shape[1]} tokens was resampled to {after.shape[1]} (bicubic, by "
            "timm): fine-tune at the new size, or pass --img-size as trained"
        )
    if found.keys() != state.keys():
        notes.append(f"{path.name}: its names were converted to timm's by timm's own converter")
    return found, notes


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and values, whatever file format they came in."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _faults(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[list[str]]:
    """What is missing, what is unknown, and what is of another shape; an empty list where nothing is."""
    kinds = [
        [f"{key}: missing" for key in expected if key not in state],
        [f"{key}: not in the model" for key in state if key not in expected],
        [
            f"{key}: shape {tuple(state[key].shape)} in the file, {tuple(expected[key].shape)} in the model"
            for key in expected
            if key in state and state[key].shape != expected[key].shape
        ],
    ]
    return [kind for kind in kinds if kind]


def _shown(faults: list[list[str]]) -> str:
    """Some of every kind, kind after kind."""
    turns = [one for turn in zip_longest(*faults) for one in turn if one is not None]
    chosen = set(turns[:_SHOWN])
    lines = [one[:200] for kind in faults for one in kind if one in chosen]
    return "\n  ".join(lines) + (f"\n  and {len(turns) - _SHOWN} more" if len(turns) > _SHOWN else "")


def _hints(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], module: Any) -> list[str]:
    """What these weights seem to be, and what to do."""
    for pattern, whose, step in _FOREIGN:
        if any(re.search(pattern, key) for key in state):
            return [f"these are {whose} names: {step}"]
    hints = []
    first = min(state).partition(".")[0]
    if all(key.startswith(f"{first}.") for key in state):
        part = first[:80]
        hints.append(f"all keys begin with {part}. : save the state dict of that part alone, model.{part}.state_dict()")
    if _PATCHES not in state:
        return hints
    if not any(key.startswith(("head.", "attn_pool.")) for key in state) and any(key.startswith("head.") for key in expected):
        hints.append(
            "no classifier head is in the file: these are weights of a pretraining; fine-tune them on your classes first"
        )
    if arguments := _differing_arguments(state, module):
        shape = shape_of(state)
        looks = f"this looks like depth {shape.get('depth')}, width {shape.get('embed_dim')}"
        given = " ".join(f"--model-arg {name}={value}" for name, value in arguments.items())
        guess = (
            " (64 a head, as in most ViTs: the file does not say)"
            if "num_heads" in arguments and not shape.get("num_heads")
            else ""
        )
        hints.append(f"{looks}: pass {given}{guess}")
    return hints


def shape_of(state: Mapping[str, Tensor]) -> dict[str, int | float]:
    """The arguments of ``timm.create_model`` that the shapes of a Vision Transformer's weights tell."""
    found: dict[str, int | float] = {}
    numbers = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d{1,4})\.", key))]
    if numbers:
        found["depth"] = max(numbers) + 1
    patches = state.get(_PATCHES)
    if patches is not None and patches.ndim == 4:
        found |= {"embed_dim": patches.shape[0], "patch_size": patches.shape[-1]}
    if (hidden := state.get("blocks.0.mlp.fc1.weight")) is not None and hidden.ndim == 2 and hidden.shape[1]:
        ratio = hidden.shape[0] / hidden.shape[1]
        found["mlp_ratio"] = int(ratio) if ratio == int(ratio) else ratio
    if (head := state.get("head.weight")) is not None:
        found["num_classes"] = head.shape[0]
    if (norm := state.get("blocks.0.attn.q_norm.weight")) is not None and norm.shape and "embed_dim" in found and norm.shape[0]:
        found["num_heads"] = int(found["embed_dim"]) // norm.shape[0]
    if (registers := state.get("reg_token")) is not None and registers.ndim == 3:
        found["reg_tokens"] = registers.shape[1]
    return found


def _differing_arguments(state: Mapping[str, Tensor], module: Any) -> dict[str, object]:
    """The arguments that would make the model one of the file's shape; empty where it is already."""
    theirs, ours = shape_of(state), shape_of(module.state_dict())
    differing: dict[str, object] = {name: value for name, value in theirs.items() if ours.get(name) != value}
    if "embed_dim" in differing and "num_heads" not in theirs and int(theirs["embed_dim"]) % 64 == 0:
        differing["num_heads"] = int(theirs["embed_dim"]) // 64
    for name, part, value in (
        ("qk_norm", "blocks.0.attn.q_norm.weight", True),
        ("init_values", "blocks.0.ls1.gamma", 1.0),
        ("global_pool", "fc_norm.weight", "avg"),
    ):
        if part in state and part not in module.state_dict():
            differing[name] = value
    return differing
