"""The ways in which people export a Vision Transformer from PyTorch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx
import onnxslim
import torch
from torch import Tensor, nn

BATCH = "batch_size"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the warnings of torch's exporters and of tracing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def dynamo(model: nn.Module, example: Tensor, opset: int, dynamic: bool) -> onnx.ModelProto:
    """``torch.onnx.export(dynamo=True)``, the default of today's PyTorch; the batch is dynamic or that of ``example``."""
    with _quiet():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) if dynamic else None,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def torchscript(
    model: nn.Module, example: Tensor, opset: int, dynamic: bool, folded: bool = True, outputs: Sequence[str] = ("logits",)
) -> onnx.ModelProto:
    """``torch.onnx.export(dynamo=False)``, the default up to PyTorch 2.8; ``folded`` is its constant folding."""
    axes = {name: {0: "batch"} for name in ("images", *outputs)} if dynamic else None
    return _traced(model, example, opset, "images", outputs, axes, folded)


def optimum(model: nn.Module, example: Tensor, opset: int) -> onnx.ModelProto:
    """What optimum's ``main_export`` calls for an image model: TorchScript, every axis of ``pixel_values`` dynamic."""
    axes = {"pixel_values": {0: BATCH, 1: "num_channels", 2: "height", 3: "width"}, "logits": {0: BATCH}}
    return _traced(model, example, opset, "pixel_values", ["logits"], axes, folded=True)


def _traced(
    model: nn.Module,
    example: Tensor,
    opset: int,
    image: str,
    outputs: Sequence[str],
    axes: dict[str, dict[int, str]] | None,
    folded: bool,
) -> onnx.ModelProto:
    file = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            model,
            (example,),
            file,
            dynamo=False,
            opset_version=opset,
            dynamic_axes=axes,
            do_constant_folding=folded,
            input_names=[image],
            output_names=list(outputs),
        )
    return onnx.load_from_string(file.getvalue())


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model after onnxslim, as many people post-process an export."""
    with _quiet():
        result: onnx.ModelProto = onnxslim.slim(model)
    return result
