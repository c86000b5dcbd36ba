"""What the passes' FP16 result becomes in TensorRT-RTX: every attention fused, packed with fewer kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.engines.build import build_engine
from graph_passes import save_model, slim
from patchslim.choices import Layout, Mode
from tests.helpers.tensorrt_vit import AHEAD_OF_TIME, DEPTH, plan_of, wide

pytestmark = AHEAD_OF_TIME


@pytest.mark.parametrize("mode", ["compact", pytest.param("stale", marks=pytest.mark.slow)])
def test_every_rectangular_attention_is_fused_and_packed_takes_fewer_kernels(mode: Mode, tmp_path: Path) -> None:
    kernels: dict[Layout, int] = {}
    for layout in ("packed", "split"):
        path = tmp_path / f"{layout}.onnx"
        save_model(slim(wide()[1], plan_of(mode), layout=layout, precision="fp16").model, path)
        result = build_engine("trt", path, tmp_path / layout, targets=["sm89"])
        assert (result.fused_attentions, result.attentions, result.precision) == (DEPTH, DEPTH, "fp16")
        kernels[layout] = result.kernels["sm89"]
    assert kernels["packed"] < kernels["split"]
