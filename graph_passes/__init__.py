"""Cuts the tokens that a plan drops out of an exported Vision Transformer's ONNX graph. Free of torch.

- ``slim(model, plan, layout=..., precision=...) -> SlimResult(model, results)``: all passes, in order.
- ``run_passes(model, names, settings)``: chosen passes, refusals reported rather than raised.
- ``to_fp16(model)``: the model typed as FP16.
- ``load_model(path)``, ``save_model(model, path)``: ONNX files of any size; faults are ``slimming.door.InputRejected``.
- ``OnnxModel``: what these give and take, large weights left where they are; ``from_proto(model)`` and ``to_proto()``.
- ``PASSES``, ``PassResult``, ``Refusal``, ``Settings``: the registry.

``python -m graph_passes.run`` does it from the command line. Names load on first use, so that importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graph_passes.files import load_model, save_model
    from graph_passes.manager import SlimResult, default_passes, run_passes, slim, to_fp16
    from graph_passes.model import OnnxModel, Weight
    from graph_passes.registry import PASSES, PassResult, Refusal, Settings

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

_HOME = {"load_model": "files", "save_model": "files", "OnnxModel": "model", "Weight": "model"} | dict.fromkeys(
    ["SlimResult", "default_passes", "run_passes", "slim", "to_fp16", "PASSES"], "manager"
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'graph_passes' has no attribute '{name}'")
    return getattr(import_module(f"graph_passes.{_HOME.get(name, 'registry')}"), name)
