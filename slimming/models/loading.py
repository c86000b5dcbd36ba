"""Which model, with which weights: presets, any timm name, and weights from the package, a file or a hub."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchslim.choices import Layout
from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.packages import install_command
from slimming.models.timm_names import PRESETS, check_model_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from patchslim.plan import SlimPlan
    from slimming.models.reader import ModelReader, TimmVit

BUNDLED = {"vit_ti": "vit_ti_digits.safetensors"}
"""Files of the package ``patchslim_digits``, a distribution of its own (``weights/`` in a checkout)."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class LoadedModel:
    """A timm model in eval mode with all that is known of it: a ``LoadedVit``."""

    name: str  # as asked for: a preset or a timm name
    architecture: str  # timm's name
    arguments: dict[str, Any]  # given to timm.create_model
    module: TimmVit
    data_config: dict[str, Any]  # timm's: input_size, interpolation, mean, std, crop_pct, crop_mode
    weights: str  # bundled, pretrained, random or the file's name
    weights_sha256: str  # over names, shapes and values of the state dict
    record: dict[str, Any]  # what a bundled file says of its own training; else empty

    @property
    def reader(self) -> ModelReader:
        """The model as embedding, blocks and head. Raises ``InputRejected`` where its family is not supported."""
        from slimming.models.reader import reader_of

        return reader_of(self.module, self.name)

    def slimmed(self, model: nn.Module, plan: SlimPlan, layout: Layout) -> nn.Module:
        """Return ``model`` cut to ``plan``, in eval mode on its own device; PyTorch computes the same in every ``layout``."""
        from slimming.models.slim_vit import SlimViT

        return SlimViT(model, plan).eval()


def parse_arguments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Return the keyword arguments in ``("img_size=96", ...)``; values are Python literals or text. Raises ``UsageError``."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise UsageError(f"--model-arg {pair}: expected key=value")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    return arguments


def load_model(
    name: str,
    *,
    weights: str = "bundled",
    arguments: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Create a timm model and give it its weights.

    ``name`` is a preset or a timm name, ``weights`` one of ``bundled``, ``pretrained`` (the only one that may use the network),
    ``random`` (drawn from ``seed``) or a path; ``classes`` sizes the head unless ``arguments`` do or weights are pretrained;
    ``preprocessing`` overrides the model's data config (timm's names).
    Raises ``UsageError``, ``InputRejected`` (unknown model, unusable file) or ``Unavailable`` (no such weights here).
    """
    if weights != "pretrained":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import timm
    import torch
    from timm.data import resolve_data_config

    from slimming.models.reader import check_supported

    architecture = PRESETS.get(name, name)
    arguments = dict(arguments or {})
    overrides = {key: value for key, value in (preprocessing or {}).items() if value is not None}
    if "img_size" in overrides:
        arguments.setdefault("img_size", overrides["img_size"])
    if classes is not None and weights != "pretrained":
        arguments.setdefault("num_classes", classes)
    if weights == "bundled" and name in BUNDLED:  # the classes that they know, where nothing else says
        arguments.setdefault("num_classes", len(read_weights(bundled_weights(name))[1]["labels"]))
    if not timm.is_model(architecture.split(".")[0]):
        check_model_name(name)
    torch.manual_seed(seed)
    try:
        module = timm.create_model(architecture, pretrained=weights == "pretrained", **arguments)
        if getattr(module, "dynamic_img_size", False) and "dynamic_img_size" not in arguments:
            # A static plan needs one grid: that of the model's own image size (DINOv3 leaves it open by default).
            arguments["dynamic_img_size"] = False
            torch.manual_seed(seed)
            module = timm.create_model(architecture, pretrained=weights == "pretrained", **arguments)
    except (OSError, RuntimeError) as error:
        if weights != "pretrained":
            raise InputRejected(f"model {name}: timm cannot create it: {_first_line(error)}") from error
        raise Unavailable(
            f"the pretrained weights of {name} cannot be fetched from here ({_first_line(error)}): "
            "pass --weights PATH with a safetensors file, or --weights random to try the pipeline"
        ) from error
    except Exception as error:  # --model-arg reaches any line of timm; after OSError: a hub's "not found" may be both
        fault = f"{type(error).__name__}: {_first_line(error)}"
        raise InputRejected(f"model {name}: timm refuses {arguments or 'it'}: {fault}") from error
    if weights == "bundled" and name not in BUNDLED:
        check_supported(module, name)  # first what no weights could change
        raise Unavailable(
            f"no weights are bundled for {name} (only for {', '.join(BUNDLED)}): pass --weights PATH, pretrained or random"
        )
    record: dict[str, Any] = {}
    if weights not in ("pretrained", "random"):
        path = bundled_weights(name) if weights == "bundled" else Path(weights)
        state, record = read_weights(path)
        apply_weights(module, state, path)
    config = resolve_data_config(args=overrides, pretrained_cfg={**module.pretrained_cfg, **record.get("data_config", {})})
    side = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if isinstance(side, tuple):  # the model's own, whatever the overrides and the record say
        config["input_size"] = (config["input_size"][0], *side)
    config = {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in config.items()}
    if fault := _preprocessing_fault(config):
        raise InputRejected(f"model {name} with weights {weights}: its preprocessing cannot be used: {fault}")
    return LoadedModel(
        name=name,
        architecture=architecture,
        arguments=arguments,
        module=module.eval().requires_grad_(False),
        data_config=config,
        weights=weights if weights in ("bundled", "pretrained", "random") else Path(weights).name,
        weights_sha256=state_digest(module.state_dict()),
        record=record,
    )


def bundled_weights(name: str) -> Path:
    """The weights file that is bundled for the preset ``name``; raises ``Unavailable`` where its package is not installed."""
    package = importlib.util.find_spec("patchslim_digits")
    if package is None or package.origin is None:
        raise Unavailable(
            f"the bundled weights of {name} are not installed: {install_command('export')}, or, from a checkout, "
            "pip install ./weights; or pass --weights PATH, pretrained or random"
        )
    return Path(package.origin).with_name(BUNDLED[name])


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a state dict, and the training record of a bundled file, from safetensors or a ``weights_only`` pickle.

    Raises ``InputRejected`` naming the file and the fault.
    """
    import torch
    from safetensors import safe_open

    if not path.is_file():
        raise InputRejected(f"{path}: no such weights file; --weights takes bundled, pretrained, random or a file")
    if path.stat().st_size == 0:
        raise InputRejected(f"{path}: the weights file is empty")
    record: Any = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {}).get("patchslim", "{}"))
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputRejected(f"{path}: not a plain weights pickle: {_first_line(error)}; save it as safetensors") from error
    except Exception as error:  # on damaged bytes PyTorch's unpickler raises whatever its stack machine runs into
        raise InputRejected(f"{path}: truncated or corrupt weights: {_first_line(error)}") from error
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())
    ):
        raise InputRejected(f"{path}: holds no state dict of tensors")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    for key, value in state.items():
        if value.is_floating_point() and not bool(value.float().isfinite().all()):
            raise InputRejected(f"{path}: {key} holds NaN or Inf")
    if not isinstance(record, dict) or not isinstance(record.get("data_config", {}), dict):
        raise InputRejected(f"{path}: its training record is not a JSON object, or its data_config is not one")
    return state, record


def apply_weights(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load ``state`` into ``module``. Raises ``InputRejected`` listing the tensors missing, unknown or of another shape."""
    expected = module.state_dict()
    faults = [f"{key}: missing" for key in expected if key not in state]
    faults += [f"{key}: not in the model" for key in state if key not in expected]
    faults += [
        f"{key}: shape {tuple(state[key].shape)} in the file, {tuple(expected[key].shape)} in the model"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if faults:
        shown = "\n  ".join(faults[:12]) + (f"\n  and {len(faults) - 12} more" if len(faults) > 12 else "")
        raise InputRejected(f"{path}: these weights do not fit the model:\n  {shown}")
    module.load_state_dict({key: state[key].to(expected[key].dtype) for key in expected})


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and values, whatever file format they came in."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _preprocessing_fault(config: dict[str, Any]) -> str:
    """What is wrong with a resolved data config, which a weights file may have had a say in; "" where nothing is."""
    for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", ("center", "squash", "border"))):
        if config[key] not in known:
            return f"{key} {config[key]!r} is none of {', '.join(known)}"
    for key in ("mean", "std"):
        values = config[key]
        if not isinstance(values, list) or len(values) != 3 or not all(_is_finite(value) for value in values):
            return f"{key} {values!r} is not three finite numbers"
    if min(config["std"]) <= 0:
        return f"std {config['std']} is not above 0"
    if not _is_finite(config["crop_pct"]) or not 0 < config["crop_pct"] <= 4:
        return f"crop_pct {config['crop_pct']!r} is not a share above 0, at most 4"
    return ""


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
