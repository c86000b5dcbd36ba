"""The dense ONNX model: torch's dynamo exporter at opset 20 with a dynamic batch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

OPSET = 20
INPUT, OUTPUT, BATCH = "images", "logits", "batch"


def export_dense(model: Any, input_size: tuple[int, int, int], path: Path) -> None:
    """Export a timm ViT, ``images [batch, 3, h, w]`` to ``logits [batch, classes]``, float32, weights inside the file.

    Attention is exported in its explicit form, scale, MatMul, Softmax, MatMul, which the graph passes read and TensorRT fuses.
    Raises ``RuntimeError`` when the exporter fails, ``OSError`` when the file cannot be written.
    """
    import torch

    explicit = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in explicit:
        module.fused_attn = False
    device = next(model.parameters()).device
    example = torch.zeros(2, *input_size, device=device)  # a batch of 1 would be specialised
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},),
                verbose=False,
            )
            if program is None:
                raise RuntimeError("the exporter returned nothing")
            program.save(str(path), external_data=False)
    finally:
        quiet.setLevel(level)
        for module in explicit:
            module.fused_attn = True
