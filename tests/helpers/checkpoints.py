"""Checkpoints as people have them, made on the fly: each kind of saver's file, for one tiny model."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.timm_models import TINY, build

VIT = "vit_tiny_patch16_224"
State = dict[str, Tensor]


def plain_state() -> State:
    """The weights that every kind holds."""
    return {key: value.clone() for key, value in build().state_dict().items()}


def averaged_state() -> State:
    """The running average beside them: half of each, so that it is told from them."""
    return {key: value / 2 for key, value in plain_state().items()}


def _prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def _saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def timm_train(folder: Path) -> Path:
    """``model_best.pth.tar`` of timm's train.py with --model-ema."""
    content = {
        "epoch": 3,
        "arch": VIT,
        "state_dict": plain_state(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
        "version": 2,
        "args": argparse.Namespace(model=VIT, lr=np.float64(1e-3), output=pathlib.Path("output/train")),
        "amp_scaler": {"scale": 65536.0},
        "state_dict_ema": averaged_state(),
        "metric": np.float32(81.5),
    }
    return _saved(folder / "model_best.pth.tar", content)


def deit_main(folder: Path) -> Path:
    """``checkpoint.pth`` of DeiT's main.py."""
    args = argparse.Namespace(output_dir=pathlib.Path("out"), data_set="IMNET")
    content = {"model": plain_state(), "optimizer": {}, "epoch": 1, "model_ema": averaged_state(), "scaler": {}, "args": args}
    return _saved(folder / "checkpoint.pth", content)


def mae_finetune(folder: Path) -> Path:
    """``checkpoint-99.pth`` of MAE's main_finetune.py."""
    content = {"model": plain_state(), "optimizer": {}, "epoch": 99, "scaler": {}, "args": argparse.Namespace(nb_classes=7)}
    return _saved(folder / "checkpoint-99.pth", content)


def compiled(folder: Path) -> Path:
    """Saved from ``torch.compile(model)``."""
    return _saved(folder / "compiled.pth", _prefixed("_orig_mod.", plain_state()))


def parallel(folder: Path) -> Path:
    """Saved from a DDP module."""
    return _saved(folder / "ddp.pth", {"state_dict": _prefixed("module.", plain_state())})


def parallel_compiled(folder: Path) -> Path:
    """DDP around a compiled module."""
    return _saved(folder / "both.pth", _prefixed("module._orig_mod.", plain_state()))


def compiled_parallel(folder: Path) -> Path:
    """A compiled DDP module."""
    return _saved(folder / "other.pth", _prefixed("_orig_mod.module.", plain_state()))


def lightning(folder: Path) -> Path:
    """A Lightning checkpoint whose module keeps the ViT as ``model``, with a loss of weights beside it."""
    state = _prefixed("model.", plain_state()) | {"criterion.weight": torch.ones(7)}
    content = {"epoch": 2, "global_step": 10, "pytorch-lightning_version": "2.4.0", "state_dict": state, "loops": {}}
    return _saved(folder / "epoch=2.ckpt", content)


def timm_save_pretrained(folder: Path) -> Path:
    """A folder as ``timm.models.save_for_hf`` writes it."""
    target = folder / "timm_hub"
    target.mkdir()
    save_file(plain_state(), target / "model.safetensors")
    arguments = {key: value for key, value in TINY.items() if key != "num_classes"}
    config = {
        "architecture": VIT,
        "num_classes": 7,
        "num_features": 48,
        "global_pool": "token",
        "model_args": arguments,
        "label_names": [f"class {index}" for index in range(7)],
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "crop_pct": 1.0, "interpolation": "bilinear"},
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


def timm_in_transformers(folder: Path) -> Path:
    """A folder of transformers' ``TimmWrapperForImageClassification.save_pretrained``, as a pickle."""
    target = timm_save_pretrained(folder)
    (target / "model.safetensors").unlink()
    _saved(target / "pytorch_model.bin", _prefixed("timm_model.", plain_state()))
    return target


def half_precision(folder: Path) -> Path:
    """Weights saved as FP16."""
    return _saved(folder / "half.pth", {key: value.half() for key, value in plain_state().items()})


def other_resolution(folder: Path) -> Path:
    """Weights of a model that was trained on larger images."""
    path = folder / "large.safetensors"
    save_file({key: value.clone() for key, value in build(img_size=96).state_dict().items()}, path)
    return path


def swa_averaged(folder: Path) -> Path:
    """Saved from ``torch.optim.swa_utils.AveragedModel``."""
    return _saved(folder / "swa.pth", _prefixed("module.", plain_state()) | {"n_averaged": torch.tensor(5)})


#: Kinds that are read as they are, with the name that a manifest records.
READ: dict[Callable[[Path], Path], str] = {
    timm_train: "model_best.pth.tar (state_dict)",
    deit_main: "checkpoint.pth (model)",
    mae_finetune: "checkpoint-99.pth",
    compiled: "compiled.pth",
    parallel: "ddp.pth",
    parallel_compiled: "both.pth",
    compiled_parallel: "other.pth",
    lightning: "epoch=2.ckpt",
    timm_save_pretrained: "timm_hub/model.safetensors",
    timm_in_transformers: "timm_hub/pytorch_model.bin",
    half_precision: "half.pth",
    swa_averaged: "swa.pth",
}


def hugging_face_names(folder: Path) -> Path:
    """transformers' ViTForImageClassification."""
    names = ("vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight", "classifier.weight")
    target = folder / "hf_vit"
    target.mkdir()
    save_file({name: torch.zeros(3) for name in names}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"]}))
    return target


def lora(folder: Path) -> Path:
    """An adapter alone."""
    path = folder / "adapter_model.safetensors"
    save_file({"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 48)}, path)
    return path


def unknown_prefix(folder: Path) -> Path:
    """The ViT within a model of the user's own."""
    return _saved(folder / "own.pth", _prefixed("backbone.", plain_state()))


def masked_autoencoder(folder: Path) -> Path:
    """MAE's pretraining, with its decoder and no head."""
    state = {key: value for key, value in plain_state().items() if not key.startswith("head.")}
    return _saved(folder / "pretrain.pth", {"model": state | {"decoder_blocks.0.norm1.weight": torch.zeros(8)}})


def other_shape(folder: Path) -> Path:
    """A model of another depth and width."""
    path = folder / "small.safetensors"
    tiny = {**TINY, "depth": 3, "embed_dim": 128, "num_heads": 2}
    save_file(timm.create_model(VIT, pretrained=False, **tiny).state_dict(), path)
    return path


def whole_model(folder: Path) -> Path:
    """``torch.save(model)``: Python objects, which would run."""
    return _saved(folder / "model.pt", build())


#: Kinds that are refused, with what the message must say.
REFUSED: dict[Callable[[Path], Path], tuple[str, ...]] = {
    hugging_face_names: (
        "these are Hugging Face's names",
        "python -m slimming.run --onnx",
        "cls_token: missing",
        "not in the model",
    ),
    lora: ("these are LoRA's names", "merge_and_unload()"),
    unknown_prefix: ("all keys begin with backbone.", "model.backbone.state_dict()"),
    masked_autoencoder: ("a masked autoencoder's before fine-tuning", "classifier head"),
    other_shape: (
        "this looks like depth 3, width 128",
        "--model-arg depth=3 --model-arg embed_dim=128 --model-arg num_heads=2",
    ),
    whole_model: ("of type timm.models.vision_transformer.VisionTransformer", "save_file(model.state_dict()"),
}
