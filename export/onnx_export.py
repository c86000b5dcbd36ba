"""Exports the dense model to ONNX, by PyTorch's dynamo exporter at opset 20 with a dynamic batch axis."""

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
    """Write a timm ViT as one ONNX file: ``images`` (batch, channels, h, w) to ``logits`` (batch, classes), float32.

    ``input_size`` is (channels, h, w). Attention is exported as scale, MatMul, Softmax, MatMul: the passes read that form, and
    TensorRT fuses it. Raises ``RuntimeError`` where the exporter fails, ``OSError`` where the file cannot be written.
    """
    import torch

    explicit = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in explicit:
        module.fused_attn = False
    device = next(model.parameters()).device
    example = torch.zeros(2, *input_size, device=device)  # of a batch of 1 the exporter makes a constant
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
                raise RuntimeError("torch.onnx.export returned no program")
            program.save(str(path), external_data=False)
    finally:
        quiet.setLevel(level)
        for module in explicit:
            module.fused_attn = True
