"""ONNX Runtime as the engine: the ONNX file itself is what runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.engines.base import Batch, EngineResult
from export.engines.onnx_info import OnnxFacts
from patchslim.choices import Precision
from patchslim.errors import InputRejected, Unavailable

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OrtSession:
    """An ONNX classifier in ONNX Runtime, on the GPU where the CUDA provider and a GPU are present, else on the CPU.

    ``threads`` None leaves the number of threads to ONNX Runtime. Idle threads do not spin: spinning disturbs whatever is
    measured next in the same process.

    Raises:
        InputRejected: the file is missing, damaged, or does not take one floating-point input.
        Unavailable: onnxruntime is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors only
        if threads is not None:
            options.intra_op_num_threads = threads
        if not Path(path).is_file():
            raise InputRejected(f"{path}: no such file")
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=_providers(runtime))
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise InputRejected(f"{path}: ONNX Runtime cannot load it ({error})") from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in _NUMPY:
            raise InputRejected(f"{path}: expected one floating-point input, found {[(i.name, i.type) for i in inputs]}")
        self.path = Path(path)
        self.input_name: str = inputs[0].name
        self.dtype = np.dtype(_NUMPY[inputs[0].type])

    @property
    def providers(self) -> list[str]:
        """The execution providers in use, the preferred one first."""
        return list(self._session.get_providers())

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return the first output, logits (batch, classes) as float32, for images (batch, channels, height, width).

        Images are cast to the type that the graph takes.

        Raises:
            InputRejected: the shape of ``images`` does not fit the graph.
        """
        try:
            outputs = self._session.run(None, {self.input_name: np.ascontiguousarray(images, dtype=self.dtype)})
        except Exception as error:
            raise InputRejected(f"{self.path}: cannot run on images of shape {images.shape} ({error})") from error
        return np.asarray(outputs[0], dtype=np.float32)


def build(onnx_path: Path, facts: OnnxFacts, *, precision: Precision, batch: Batch) -> EngineResult:
    """Open ``onnx_path``, run it once on blank images, and describe it as an engine."""
    session = OrtSession(onnx_path)
    session.run(np.zeros((batch[0], *facts.image_shape), dtype=session.dtype))
    return EngineResult(
        backend="onnxruntime",
        version=_runtime().__version__,
        targets=["cuda" if session.providers[0].startswith("CUDA") else "cpu"],
        precision=precision,
        batch=batch,
        files=[onnx_path],
        layers_file=None,
        attentions=len(facts.attentions),
        executed=True,
    )


def _runtime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise Unavailable('the ort engine needs onnxruntime: pip install "patchslim[export]"') from error
    return onnxruntime


def _providers(runtime: Any) -> list[str]:
    from export.engines import cuda

    # onnxruntime-gpu lists its CUDA provider on a machine without a GPU too, and then complains at every session.
    if "CUDAExecutionProvider" in runtime.get_available_providers() and cuda.local_target() is not None:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]
