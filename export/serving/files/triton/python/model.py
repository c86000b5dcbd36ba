"""Triton's Python backend: answers images with logits in ONNX Runtime. Lies beside model.onnx in the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton  # given by the server


class TritonPythonModel:
    """One instance of the model; Triton makes as many as ``instance_group`` in config.pbtxt says."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model."""
        config = json.loads(args["model_config"])
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores to others
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), options, onnxruntime.get_available_providers())

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests of one batch with one run, each with its own rows of logits."""
        images = [triton.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests]
        (logits,) = self.session.run([self.output], {self.input: np.concatenate(images)})
        ends = np.cumsum([len(part) for part in images])[:-1]
        parts = [np.ascontiguousarray(part) for part in np.split(logits, ends)]
        return [triton.InferenceResponse([triton.Tensor(self.output, part)]) for part in parts]
