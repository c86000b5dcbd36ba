"""Models in OpenVINO, on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected
from patchslim.openvino_compiler import GraphCompiler, openvino_core, openvino_module
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.runner import BatchLimits, TensorInfo, ensure_logits, image_input

_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "float64": "tensor(double)"}
_DEFAULT = OpenVinoSettings()


class OpenVinoModel:
    """A model of one input in OpenVINO. Use it in a ``with`` block to give its memory back at the end.

    ``model`` is an ONNX file, the XML file of an OpenVINO IR with its BIN file beside it, or the bytes of either; then
    ``weights`` are the bytes of the BIN file. ``name`` is what messages call it (default: the file).

    Where the first axis of the input is free it is compiled for each number of rows when that comes first: what knows its
    shapes is up to 1.16 times as fast (ViT-Ti, INT8, one image; OpenVINO 2026.4). After ``MOST_COMPILED`` numbers of
    ``patchslim.openvino_compiler``, or where their weights would take more than its ``MOST_BYTES``, others run in a model that
    takes any number.

    Raises ``Unavailable`` without OpenVINO, ``InputRejected`` where it cannot load the model.
    """

    def __init__(
        self, model: Path | bytes, settings: OpenVinoSettings = _DEFAULT, *, weights: bytes | None = None, name: str = ""
    ) -> None:
        self.name = name or (str(model) if isinstance(model, Path) else "the model")
        core = openvino_core()
        if isinstance(model, Path) and not model.is_file():
            raise InputRejected(f"{self.name}: is not a file")
        try:
            graph = core.read_model(
                model=str(model) if isinstance(model, Path) else model, **({} if weights is None else {"weights": weights})
            )
            self.inputs = [_described(tensor) for tensor in graph.inputs]
            self.outputs = [_described(tensor) for tensor in graph.outputs]
            self._compiler: GraphCompiler | None = GraphCompiler.of(graph, model, settings)
            self._requests: dict[int | None, list[Any]] = {}  # by the number of rows, as many as run at once
            rows = 1 if self._compiler.most else None
            network = self._compiler.compiled(rows)
            self.precision = network.get_property("INFERENCE_PRECISION_HINT").to_string()
            many = int(network.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) if settings.hint == "throughput" else 1
            self._requests[rows] = [network.create_infer_request() for _ in range(many)]
        except Exception as error:  # OpenVINO raises RuntimeError and kin of every kind
            raise InputRejected(f"{self.name}: OpenVINO cannot load it: {_last_line(error)}") from error
        self.at_once = many
        """How many batches it runs at once: 1 by the hint latency, what OpenVINO finds best for one row by throughput."""
        self._turn = threading.RLock()

    def run(self, values: Array) -> Array:
        """The first output for ``values``, an array of the input's type, in OpenVINO's own memory: the next run overwrites it.

        Raises ``InputRejected`` where OpenVINO cannot run the model on them.
        """
        shared = self.at_once == 1  # what one of several requests shares is read by the others as well (2026.4)
        try:
            with self._turn:
                return np.asarray(self._requests_for(len(values))[0].infer({0: values}, share_inputs=shared)[0])
        except Exception as error:
            raise InputRejected(f"{self.name}: OpenVINO cannot run it on {values.shape}: {_last_line(error)}") from error

    def run_at_once(self, parts: Sequence[Array]) -> list[Array]:
        """The first output for each of ``parts``, at most ``at_once`` arrays of the input's type.

        Raises ``InputRejected`` where OpenVINO cannot run the model on one of them.
        """
        with self._turn:
            running, failed = [], None
            for index, part in enumerate(parts):
                try:
                    request = self._requests_for(len(part))[index]
                    request.start_async({0: part})
                    running.append((request, part.shape))
                except Exception as error:  # not raised before the others have ended
                    failed = part.shape, error
                    break
            for request, shape in running:
                try:
                    request.wait()
                except Exception as error:
                    failed = failed or (shape, error)
            if failed is None:
                return [request.get_output_tensor(0).data.copy() for request, _ in running]
        raise InputRejected(f"{self.name}: OpenVINO cannot run it on {failed[0]}: {_last_line(failed[1])}") from failed[1]

    def _requests_for(self, rows: int) -> list[Any]:
        """What runs ``rows`` rows, ``at_once`` times at once. By one thread at a time: a graph has one shape at a time."""
        if rows in self._requests:
            return self._requests[rows]
        if self._compiler is None:
            raise RuntimeError("it is closed")
        fixed = sum(key is not None for key in self._requests)
        key = rows if rows > 0 and fixed < self._compiler.most else None
        if key not in self._requests:
            network = self._compiler.compiled(key)
            self._requests[key] = [network.create_infer_request() for _ in range(self.at_once)]
        return self._requests[key]

    def dtype_of(self, tensor: TensorInfo) -> np.dtype[Any]:
        """The NumPy type of an input; float32 for types that are not floating-point."""
        return np.dtype(next((kind for kind, named in _TYPES.items() if named == tensor.type), "float32"))

    def close(self) -> None:
        """Give the model's memory back; it cannot be run afterwards."""
        with self._turn:
            self._compiler, self._requests = None, {}

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
        self, model: Path | bytes, settings: OpenVinoSettings = _DEFAULT, *, weights: bytes | None = None, name: str = ""
    ) -> None:
        super().__init__(model, settings, weights=weights, name=name)
        first = image_input(self.inputs, _TYPES.values(), self.name)
        self.batch_limits: BatchLimits = first.batch_limits
        self.image_shape: tuple[int, int, int] = first.image_shape
        self.dtype = self.dtype_of(self.inputs[0])

    def infer(self, images: Array) -> Array:
        """Return the first output, logits (b, classes) float32, for ``images`` (b, channels, height, width) of any float type.

        By the hint throughput they are divided among as many batches as run at once, where the batch is free. Raises
        ``InputRejected`` for images that do not fit, or answers that are not logits. Threads take turns.
        """
        values = np.ascontiguousarray(images, dtype=self.dtype)
        parts = min(self.at_once, len(values)) if self.batch_limits[1] is None else 1
        with self._turn:  # until the answer is copied: OpenVINO's own memory holds the next one
            logits = np.concatenate(self.run_at_once(np.array_split(values, parts))) if parts > 1 else self.run(values)
            ensure_logits(logits, images, self.name)
            return logits.astype(np.float32)


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16, as OpenVINO sees it; raises ``Unavailable`` without OpenVINO."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def save_ir(onnx: Path, xml: Path) -> None:
    """Write the ONNX file ``onnx`` as an OpenVINO IR: ``xml``, and its weights, as they are, in a BIN file beside it.

    Raises ``Unavailable`` without OpenVINO, ``InputRejected`` where it cannot read the model.
    """
    core = openvino_core()
    try:
        graph = core.read_model(model=str(onnx))
    except Exception as error:
        raise InputRejected(f"{onnx}: OpenVINO cannot load it: {_last_line(error)}") from error
    for number, op in enumerate(graph.get_ordered_ops()):
        kind, _, counted = op.get_friendly_name().rpartition("_")
        if kind == op.get_type_name() and counted.isdecimal():  # OpenVINO counts what it names through the whole process
            op.set_friendly_name(f"{kind}_{number}")
    openvino_module().save_model(graph, str(xml), compress_to_fp16=False)


def openvino_version() -> str:
    """The installed OpenVINO's version; raises ``Unavailable`` without one."""
    return str(openvino_module().__version__).partition("-")[0]


def _described(tensor: Any) -> TensorInfo:
    shape = tuple(axis.get_length() if axis.is_static else "batch" for axis in tensor.get_partial_shape())
    kind = tensor.get_element_type().to_dtype().name
    return TensorInfo(tensor.get_any_name(), _TYPES.get(kind, f"tensor({kind})"), shape)


def _last_line(error: Exception) -> str:
    """What OpenVINO has to say after the places in its source code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
