"""Models in OpenVINO, on the CPU: the one place that compiles them."""

from __future__ import annotations

import functools
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from patchslim.arrays import Array
from patchslim.choices import InferencePrecision
from patchslim.errors import InputRejected, Unavailable
from patchslim.packages import install_command
from patchslim.runner import BatchLimits, TensorInfo, ensure_logits, image_input

_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "float64": "tensor(double)"}


class OpenVinoModel:
    """A model of one input in OpenVINO. Use it in a ``with`` block to give its memory back at the end.

    ``model`` is an ONNX file, the XML file of an OpenVINO IR with its BIN file beside it, or the bytes of either; then
    ``weights`` are the bytes of the BIN file. ``name`` is what messages call it (default: the file). ``threads`` 0 leaves
    their number to OpenVINO. A CPU without bfloat16 computes in f32 whatever ``precision`` asks for. ``cache`` is a folder in
    which OpenVINO keeps what it compiled. Raises ``Unavailable`` without OpenVINO, ``InputRejected`` where it cannot load the
    model.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        weights: bytes | None = None,
        name: str = "",
        threads: int = 0,
        precision: InferencePrecision = "f32",
        cache: Path | None = None,
    ) -> None:
        self.name = name or (str(model) if isinstance(model, Path) else "the model")
        core = _core()
        if isinstance(model, Path) and not model.is_file():
            raise InputRejected(f"{self.name}: is not a file")
        settings: dict[str, object] = dict(settings_of(precision))
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        if cache is not None:
            settings["CACHE_DIR"] = str(cache)
        beside = {} if weights is None else {"weights": weights}
        try:
            graph = core.read_model(model=str(model) if isinstance(model, Path) else model, **beside)
            self.inputs = [_described(tensor) for tensor in graph.inputs]
            self.outputs = [_described(tensor) for tensor in graph.outputs]
            compiled = core.compile_model(graph, "CPU", settings)
            self.precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
            self._request = compiled.create_infer_request()
        except Exception as error:  # OpenVINO raises RuntimeError and kin of every kind
            raise InputRejected(f"{self.name}: OpenVINO cannot load it: {_last_line(error)}") from error

    def run(self, values: Array) -> Array:
        """The first output for ``values``, an array of the input's type, in OpenVINO's own memory: the next run overwrites it.

        Raises ``InputRejected`` where OpenVINO cannot run the model on them.
        """
        try:
            return np.asarray(self._request.infer({0: values}, share_inputs=True)[0])
        except Exception as error:
            raise InputRejected(f"{self.name}: OpenVINO cannot run it on {values.shape}: {_last_line(error)}") from error

    def dtype_of(self, tensor: TensorInfo) -> np.dtype[Any]:
        """The NumPy type of an input; float32 for types that are not floating-point."""
        return np.dtype(next((kind for kind, named in _TYPES.items() if named == tensor.type), "float32"))

    def close(self) -> None:
        """Give the model's memory back; it cannot be run afterwards."""
        self._request = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class OpenVinoRunner(OpenVinoModel):
    """An image classifier in OpenVINO: a ``Runner``, opened as ``OpenVinoModel`` is.

    Raises ``InputRejected``, beside ``OpenVinoModel``'s, unless the model has one floating-point input (batch, channels,
    height, width) of which only the batch may be free.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        weights: bytes | None = None,
        name: str = "",
        threads: int = 0,
        precision: InferencePrecision = "f32",
        cache: Path | None = None,
    ) -> None:
        super().__init__(model, weights=weights, name=name, threads=threads, precision=precision, cache=cache)
        first = image_input(self.inputs, _TYPES.values(), self.name)
        self.batch_limits: BatchLimits = first.batch_limits
        self.image_shape: tuple[int, int, int] = first.image_shape
        self.dtype = self.dtype_of(self.inputs[0])

    def infer(self, images: Array) -> Array:
        """Return the first output, logits (b, classes) float32, for ``images`` (b, channels, height, width) of any float type.

        Raises ``InputRejected`` for images that do not fit, or answers that are not logits.
        """
        logits = self.run(np.ascontiguousarray(images, dtype=self.dtype))
        ensure_logits(logits, images, self.name)
        return logits.astype(np.float32)  # a copy: OpenVINO's own memory holds the next answer


def settings_of(precision: InferencePrecision) -> dict[str, str]:
    """What OpenVINO is told to run a model in ``precision``, by the names of its properties."""
    return {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16, as OpenVINO sees it; raises ``Unavailable`` without OpenVINO."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def save_ir(onnx: Path, xml: Path) -> None:
    """Write the ONNX file ``onnx`` as an OpenVINO IR: ``xml``, and its weights, as they are, in a BIN file beside it.

    Raises ``Unavailable`` without OpenVINO, ``InputRejected`` where it cannot read the model.
    """
    core = _core()
    try:
        graph = core.read_model(model=str(onnx))
    except Exception as error:
        raise InputRejected(f"{onnx}: OpenVINO cannot load it: {_last_line(error)}") from error
    for number, op in enumerate(graph.get_ordered_ops()):
        kind, _, counted = op.get_friendly_name().rpartition("_")
        if kind == op.get_type_name() and counted.isdecimal():  # OpenVINO counts what it names through the whole process
            op.set_friendly_name(f"{kind}_{number}")
    _openvino().save_model(graph, str(xml), compress_to_fp16=False)


def openvino_version() -> str:
    """The installed OpenVINO's version; raises ``Unavailable`` without one."""
    return str(_openvino().__version__).partition("-")[0]


@functools.cache
def _core() -> Any:
    """OpenVINO's one ``Core`` of this process, which stays to its end; raises ``Unavailable`` without OpenVINO.

    Each ``Core`` that compiles for a CPU gives the thread a stack for signals (2026.4), and takes back the one before at its
    end. Where they end in the order in which they began, the thread is left with one that is freed, and dies at its next
    signal: that of a child that ends, say.
    """
    return _openvino().Core()


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
