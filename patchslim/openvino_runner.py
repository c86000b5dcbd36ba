"""ONNX models in OpenVINO, on the CPU and in float32: the one place that compiles them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected, Unavailable
from patchslim.ort_runner import TensorInfo
from patchslim.packages import install_command
from patchslim.runner import BatchLimits, ensure_logits

#: Left to itself OpenVINO computes in bfloat16 where the CPU has it, and 2026.4 then answers wrongly: it mishandles a constant
#: of one row that is added to attention logits, as merged tokens have it.
PRECISION = "f32"
_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "float64": "tensor(double)"}


class OpenVinoRunner:
    """An image classifier in OpenVINO, a ``Runner``. Use it in a ``with`` block to give its memory back at the end.

    ``model`` is an ONNX file or the bytes of one, ``name`` what messages call it (default: the file). ``threads`` 0 leaves
    their number to OpenVINO. Raises ``Unavailable`` without OpenVINO; ``InputRejected`` where it cannot load the model, and
    unless that has one floating-point input (batch, channels, height, width) of which only the batch may be free.
    """

    def __init__(self, model: Path | bytes, *, name: str = "", threads: int = 0) -> None:
        self.name = name or (str(model) if isinstance(model, Path) else "the ONNX model")
        ov = _openvino()
        if isinstance(model, Path) and not model.is_file():
            raise InputRejected(f"{self.name}: is not a file")
        core = ov.Core()
        settings: dict[str, object] = {"INFERENCE_PRECISION_HINT": PRECISION, "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            graph = core.read_model(model=str(model) if isinstance(model, Path) else model)
            self.inputs = [_described(tensor) for tensor in graph.inputs]
            self.outputs = [_described(tensor) for tensor in graph.outputs]
            self._request = core.compile_model(graph, "CPU", settings).create_infer_request()
        except Exception as error:  # OpenVINO raises RuntimeError and kin of every kind
            raise InputRejected(f"{self.name}: OpenVINO cannot load it: {_last_line(error)}") from error
        first = self.inputs[0] if len(self.inputs) == 1 else None
        sizes = [] if first is None else [axis for axis in first.shape[1:] if isinstance(axis, int)]
        if first is None or first.type not in _TYPES.values() or len(first.shape) != 4 or len(sizes) != 3:
            found = "; ".join(map(str, self.inputs)) or "none"
            wanted = "one floating-point input (batch, channels, height, width), only batch free"
            raise InputRejected(f"{self.name}: expected {wanted}; found {found}")
        batch = first.shape[0]
        self.batch_limits: BatchLimits = (batch, batch) if isinstance(batch, int) else (1, None)
        self.image_shape: tuple[int, int, int] = (sizes[0], sizes[1], sizes[2])
        self.dtype: np.dtype[Any] = np.dtype(next(kind for kind, named in _TYPES.items() if named == first.type))

    def infer(self, images: Array) -> Array:
        """Return the first output, logits (b, classes) float32, for ``images`` (b, channels, height, width) of any float type.

        Raises ``InputRejected`` for images that do not fit, or answers that are not logits.
        """
        feed = np.ascontiguousarray(images, dtype=self.dtype)
        try:
            logits = np.asarray(self._request.infer({0: feed}, share_inputs=True)[0])
        except Exception as error:
            raise InputRejected(f"{self.name}: OpenVINO cannot run it on {feed.shape}: {_last_line(error)}") from error
        ensure_logits(logits, images, self.name)
        return logits.astype(np.float32)  # a copy: OpenVINO's own memory holds the next answer

    def close(self) -> None:
        """Give the model's memory back; it cannot be run afterwards."""
        self._request = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def openvino_version() -> str:
    """The installed OpenVINO's version; raises ``Unavailable`` without one."""
    return str(_openvino().__version__)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        fault = "is not installed" if error.name == "openvino" else f"cannot be imported ({error})"
        raise Unavailable(f"OpenVINO {fault}; install it: {install_command('openvino')}") from error
    return openvino


def _described(tensor: Any) -> TensorInfo:
    shape = tuple(axis.get_length() if axis.is_static else "batch" for axis in tensor.get_partial_shape())
    kind = tensor.get_element_type().to_dtype().name
    return TensorInfo(tensor.get_any_name(), _TYPES.get(kind, f"tensor({kind})"), shape)


def _last_line(error: Exception) -> str:
    """What OpenVINO has to say after the places in its source code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
