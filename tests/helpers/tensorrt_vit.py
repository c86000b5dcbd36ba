"""A ViT of ViT-Ti's width that TensorRT-RTX fuses, and when a test can build with TensorRT-RTX."""

from __future__ import annotations

import importlib.util
from functools import cache

import onnx
import pytest
import timm.layers
import torch
from timm.models.vision_transformer import VisionTransformer

from patchslim import cuda
from patchslim.choices import Mode
from patchslim.plan import SlimPlan
from tests.helpers.made_once import model_made_once
from tests.helpers.onnx_models import export_dense, plan_for

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
