"""Cuts the tokens that a plan drops out of an exported Vision Transformer's ONNX graph. Free of torch.

- ``slim(model, plan, layout=..., precision=...) -> SlimResult(model, results)``: all passes, in order.
- ``run_passes(model, names, settings)``: chosen passes, refusals reported rather than raised.
- ``to_fp16(model)``: the model typed as FP16.
- ``load_model(path)``, ``save_model(model, path)``: ONNX files of any size; faults are ``patchslim.errors.InputRejected``.
- ``OnnxModel``: what these give and take, large weights left where they are; ``from_proto(model)`` and ``to_proto()``.
- ``PASSES``, ``PassResult``, ``Refusal``, ``Settings``: the registry.

``python -m graph_passes.run`` does it from the command line. Names load on first use, so that importing the package is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchslim.lazy import lazy_names

if TYPE_CHECKING:
    from graph_passes.onnx_io.files import save_model
    from graph_passes.onnx_io.model import OnnxModel, Weight
    from graph_passes.pass_manager import SlimResult, default_passes, load_model, run_passes, slim, to_fp16
    from graph_passes.pass_registry import PASSES, PassResult, Refusal, Settings

__all__ = [
    "PASSES",
    "OnnxModel",
    "PassResult",
    "Refusal",
    "Settings",
    "SlimResult",
    "Weight",
    "default_passes",
    "load_model",
    "run_passes",
    "save_model",
    "slim",
    "to_fp16",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "OnnxModel": "graph_passes.onnx_io.model",
        "PASSES": "graph_passes.pass_registry",
        "PassResult": "graph_passes.pass_registry",
        "Refusal": "graph_passes.pass_registry",
        "Settings": "graph_passes.pass_registry",
        "SlimResult": "graph_passes.pass_manager",
        "Weight": "graph_passes.onnx_io.model",
        "default_passes": "graph_passes.pass_manager",
        "load_model": "graph_passes.pass_manager",
        "run_passes": "graph_passes.pass_manager",
        "save_model": "graph_passes.onnx_io.files",
        "slim": "graph_passes.pass_manager",
        "to_fp16": "graph_passes.pass_manager",
    },
)
