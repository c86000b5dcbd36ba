"""A ViT of ViT-Ti's width that TensorRT-RTX fuses, and when a test can build with TensorRT-RTX."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import onnx
import pytest
import timm.layers
import torch
from timm.models.vision_transformer import VisionTransformer

from export.engines.onnx_info import read_onnx
from graph_passes import load_model, save_model, to_fp16
from patchslim import cuda
from patchslim.choices import Mode
from patchslim.files import digest
from patchslim.plan import SlimPlan
from patchslim.records import save_record
from tests.helpers.made_once import model_made_once
from tests.helpers.onnx_models import export_dense, plan_for
from validate.build_recipe import RECIPE, BuildSettings, ExpectedEngine, make_recipe
from validate.manifest import FileRecord, TensorSpec

DEPTH = 4


AHEAD_OF_TIME = [
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt") is not None and cuda.local_target() is not None,
        reason="full TensorRT and a GPU are here: engines are built for that GPU, not ahead of time",
    ),
]


@cache
def wide() -> tuple[VisionTransformer, onnx.ModelProto]:
    """A ViT of four blocks with ViT-Ti's width and heads on a 4 x 4 grid, and its export."""
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    torch.manual_seed(0)
    try:
        model = VisionTransformer(img_size=64, patch_size=16, embed_dim=192, depth=DEPTH, num_heads=3, num_classes=10).eval()
    finally:
        timm.layers.set_fused_attn(bool(before))
    return model, model_made_once("wide", lambda: export_dense(model, 64))


def plan_of(mode: Mode) -> SlimPlan:
    """A cut in every block, the last to the class token."""
    return plan_for(wide()[0], [[*range(0, 15, 2), 15], [0, 2, 6, 10, 14, 15], [0, 6, 14], [0]], mode)


def fp16_recipe(folder: Path) -> Path:
    """``folder`` with that ViT as ``model.onnx``, typed FP16 as ``model.fp16.onnx``, and a recipe of the latter for sm89."""
    onnx.save(wide()[1], folder / "model.onnx")
    exported = load_model(folder / "model.onnx")
    typed = folder / "model.fp16.onnx"
    save_model(to_fp16(exported), typed)
    facts = read_onnx(typed)
    recipe = make_recipe(
        onnx=FileRecord(path=typed.name, size=typed.stat().st_size, sha256=digest(typed)),
        spec=TensorSpec(name=facts.input_name, dtype="float32", shape=["batch", *facts.image_shape]),
        batch=(1, 2, 4),
        settings=BuildSettings(
            precision="fp16", tf32=True, workspace_mib=None, optimization_level=3, compute_capabilities=["sm89"]
        ),
        expected=ExpectedEngine(precision="fp16", attentions=DEPTH, fused_attentions=DEPTH),
        tools={"tensorrt-rtx-cu13": "1"},
    )
    save_record(folder / RECIPE, recipe)
    return folder
