"""Which model, with which weights: presets, any timm name, and weights from the package, a file or a hub."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchslim.choices import Layout
from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.packages import install_command
from slimming.models.checkpoint import Checkpoint, first_line, read_checkpoint, read_labels
from slimming.models.timm_names import PRESETS, check_model_name
from slimming.models.weights import apply_weights, converted, state_digest

if TYPE_CHECKING:
    from torch import nn

    from patchslim.plan import SlimPlan
    from slimming.models.reader import ModelReader, TimmVit

BUNDLED = {"vit_ti": "vit_ti_digits.safetensors"}
"""Files of the package ``patchslim_digits``, a distribution of its own (``weights/`` in a checkout)."""
BUNDLED_LICENSE = "Apache-2.0"
_LARGEST = sys.float_info.max
_LONGEST_LICENSE = 200
_SOURCES = ("bundled", "pretrained", "random")
_TRAINED = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # what a record may say of the preprocessing
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class LoadedModel:
    """A timm model in eval mode with all that is known of it: a ``LoadedVit``."""

    name: str  # as asked for: a preset or a timm name
    architecture: str  # timm's name
    arguments: dict[str, Any]  # given to timm.create_model
    module: TimmVit
    data_config: dict[str, Any]  # timm's: input_size, interpolation, mean, std, crop_pct, crop_mode
    weights: str  # bundled, pretrained, random or the file's name, and which of its weights where it holds several
    weights_sha256: str  # over names, shapes and values of the state dict
    record: dict[str, Any]  # what a bundled file or a config.json says of the weights' training; else empty
    notes: tuple[str, ...] = ()  # what was done to make the weights fit, for the user
    license: str | None = None  # of the weights, where their record or timm's names it

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
    ema: bool = False,
) -> LoadedModel:
    """Create a timm model and give it its weights.

    ``name`` is a preset or a timm name, ``weights`` one of ``bundled``, ``pretrained`` (the only one that may use the network),
    ``random`` (drawn from ``seed``) or a path to a file or to a folder of ``save_pretrained``; ``ema`` takes the averaged
    weights that a trainer kept beside the others. ``classes`` sizes the head unless ``arguments`` or a ``config.json`` do or
    weights are pretrained; ``preprocessing`` overrides the model's data config (timm's names).
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
    if not timm.is_model(architecture.split(".")[0]):
        check_model_name(name)
    checkpoint: Checkpoint | None = None
    if (path := weights_path(name, weights)) is not None:
        checkpoint = read_checkpoint(path, ema=ema)
        if weights == "bundled":  # the classes that they know, where nothing else says
            arguments.setdefault("num_classes", len(checkpoint.record["labels"]))
        _take_config(checkpoint, name, architecture, arguments)
    elif ema:
        raise UsageError(f"--ema takes averaged weights from a file: --weights {weights} has none")
    if classes is not None and weights != "pretrained":
        arguments.setdefault("num_classes", classes)
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
            raise InputRejected(f"model {name}: timm cannot create it: {first_line(error)}") from error
        raise Unavailable(
            f"the pretrained weights of {name} cannot be fetched from here ({first_line(error)}): "
            "pass --weights PATH with a safetensors file, or --weights random to try the pipeline"
        ) from error
    except Exception as error:  # --model-arg reaches any line of timm; after OSError: a hub's "not found" may be both
        fault = f"{type(error).__name__}: {first_line(error)}"
        raise InputRejected(f"model {name}: timm refuses {arguments or 'it'}: {fault}") from error
    if weights == "bundled" and name not in BUNDLED:
        check_supported(module, name)  # first what no weights could change
        raise Unavailable(
            f"no weights are bundled for {name} (only for {', '.join(BUNDLED)}): pass --weights PATH, pretrained or random"
        )
    record: dict[str, Any] = {}
    notes: list[str] = []
    if checkpoint is not None:
        state, notes = converted(module, checkpoint.state, checkpoint.path)
        apply_weights(module, state, checkpoint.path)
        record = checkpoint.record
    trained = {key: value for key, value in record.get("data_config", {}).items() if key in _TRAINED}
    if fault := _preprocessing_fault(trained):
        raise InputRejected(f"model {name} with weights {weights}: its preprocessing cannot be used: {fault}")
    config = resolve_data_config(args=overrides, pretrained_cfg={**module.pretrained_cfg, **trained})
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
        weights=weights if weights in _SOURCES or checkpoint is None else checkpoint.source,
        weights_sha256=state_digest(module.state_dict()),
        record=record,
        notes=(*(checkpoint.notes if checkpoint else ()), *notes),
        license=BUNDLED_LICENSE
        if weights == "bundled"
        else _license(module.pretrained_cfg if weights == "pretrained" else record),
    )


def _license(record: dict[str, Any]) -> str | None:
    """The licence that a record of weights, or timm's config of pretrained ones, names."""
    found = record.get("license")
    return found[:_LONGEST_LICENSE] if isinstance(found, str) and found.strip() else None


def weights_path(name: str, weights: str) -> Path | None:
    """The file or folder that ``--weights`` names for the model ``name``; None where there is none. Raises ``Unavailable``."""
    if weights == "bundled":
        return bundled_weights(name) if name in BUNDLED else None
    return None if weights in _SOURCES else Path(weights)


def class_names(name: str, weights: str) -> list[str]:
    """The names of the classes that the weights know, in their order; empty where their file does not say.

    Raises ``InputRejected`` and ``Unavailable``.
    """
    path = weights_path(name, weights)
    return [] if path is None else read_labels(path)


def _take_config(checkpoint: Checkpoint, name: str, architecture: str, arguments: dict[str, Any]) -> None:
    """Fill ``arguments`` with what timm's own config beside the weights says. Raises ``InputRejected`` for another model's."""
    config = checkpoint.config
    if config is None or not config.architecture:
        return
    if config.architecture.split(".")[0] != architecture.split(".")[0]:
        raise InputRejected(
            f"{config.path}: these are weights of {config.architecture[:100]}, not of {name}: "
            f"pass --model {config.architecture[:100]}"
        )
    for key, value in config.arguments.items():
        arguments.setdefault(key, value)


def bundled_weights(name: str) -> Path:
    """The weights file that is bundled for the preset ``name``; raises ``Unavailable`` where its package is not installed."""
    package = importlib.util.find_spec("patchslim_digits")
    if package is None or package.origin is None:
        raise Unavailable(
            f"the bundled weights of {name} are not installed: {install_command('export')}, or, from a checkout, "
            "pip install ./weights; or pass --weights PATH, pretrained or random"
        )
    return Path(package.origin).with_name(BUNDLED[name])


def _preprocessing_fault(config: dict[str, Any]) -> str:
    """What is wrong with a resolved data config, which a weights file may have had a say in; "" where nothing is."""
    for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", ("center", "squash", "border"))):
        if config.get(key, known[0]) not in known:
            return f"{key} {config[key]!r:.100} is none of {', '.join(known)}"
    for key in ("mean", "std"):
        values = config.get(key, [0.5, 0.5, 0.5])
        if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(_is_finite(value) for value in values):
            return f"{key} {values!r:.100} is not three finite numbers"
        if key == "std" and min(values) <= 0:
            return f"std {values!r:.100} is not above 0"
    share = config.get("crop_pct", 1.0)
    if not _is_finite(share) or not 0 < share <= 4:
        return f"crop_pct {share!r:.100} is not a share above 0, at most 4"
    return ""


def _is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold; ``true`` is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
