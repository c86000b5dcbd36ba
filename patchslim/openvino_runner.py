"""Models in OpenVINO, on the CPU: the one place that compiles them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from patchslim.arrays import Array
from patchslim.blob_cache import keep_blob, kept_blob, warn_of_dropped
from patchslim.errors import InputRejected, Unavailable
from patchslim.files import digest
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.packages import install_command
from patchslim.runner import BatchLimits, TensorInfo, ensure_logits, image_input

_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "float64": "tensor(double)"}
_DEFAULT = OpenVinoSettings()
#: Numbers of rows that a model is compiled for, each with its weights, and what these take together at most.
MOST_COMPILED, MOST_BYTES = 4, 512 << 20


class OpenVinoModel:
    """A model of one input in OpenVINO. Use it in a ``with`` block to give its memory back at the end.

    ``model`` is an ONNX file, the XML file of an OpenVINO IR with its BIN file beside it, or the bytes of either; then
    ``weights`` are the bytes of the BIN file. ``name`` is what messages call it (default: the file).

    Where the first axis of the input is free it is compiled for each number of rows when that comes first: what knows its
    shapes is up to 1.16 times as fast (ViT-Ti, INT8, one image; OpenVINO 2026.4). After ``MOST_COMPILED`` numbers, or where
    their weights would take more than ``MOST_BYTES``, others run in a model that takes any number.

    Raises ``Unavailable`` without OpenVINO, ``InputRejected`` where it cannot load the model.
    """

    def __init__(
        self, model: Path | bytes, settings: OpenVinoSettings = _DEFAULT, *, weights: bytes | None = None, name: str = ""
    ) -> None:
        self.name = name or (str(model) if isinstance(model, Path) else "the model")
        core = _core()
        if isinstance(model, Path) and not model.is_file():
            raise InputRejected(f"{self.name}: is not a file")
        try:
            graph = core.read_model(
                model=str(model) if isinstance(model, Path) else model, **({} if weights is None else {"weights": weights})
            )
            self.inputs = [_described(tensor) for tensor in graph.inputs]
            self.outputs = [_described(tensor) for tensor in graph.outputs]
            self._source: _Source | None = _Source(graph, settings, _digests(model, settings), _most_compiled(graph))
            self._compiled: dict[int | None, _Compiled] = {}
            first = self._for(1)
        except Exception as error:  # OpenVINO raises RuntimeError and kin of every kind
            raise InputRejected(f"{self.name}: OpenVINO cannot load it: {_last_line(error)}") from error
        self.precision, self.at_once = first.precision, len(first.requests)
        """``at_once`` is how many batches it runs at once: 1 by the hint latency, what OpenVINO finds best by throughput."""

    def run(self, values: Array) -> Array:
        """The first output for ``values``, an array of the input's type, in OpenVINO's own memory: the next run overwrites it.

        Raises ``InputRejected`` where OpenVINO cannot run the model on them.
        """
        shared = self.at_once == 1  # what one of several requests shares is read by the others as well (2026.4)
        try:
            return np.asarray(self._for(len(values)).requests[0].infer({0: values}, share_inputs=shared)[0])
        except Exception as error:
            raise InputRejected(f"{self.name}: OpenVINO cannot run it on {values.shape}: {_last_line(error)}") from error

    def run_at_once(self, parts: Sequence[Array]) -> list[Array]:
        """The first output for each of ``parts``, at most ``at_once`` arrays of the input's type.

        Raises ``InputRejected`` where OpenVINO cannot run the model on one of them.
        """
        running, failed = [], None
        for index, part in enumerate(parts):
            try:
                request = self._for(len(part)).requests[index]
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
        if failed is not None:
            raise InputRejected(f"{self.name}: OpenVINO cannot run it on {failed[0]}: {_last_line(failed[1])}") from failed[1]
        return [request.get_output_tensor(0).data.copy() for request, _ in running]

    def _for(self, rows: int) -> _Compiled:
        """What runs ``rows`` rows."""
        if rows in self._compiled:
            return self._compiled[rows]
        if self._source is None:
            raise RuntimeError("it is closed")
        fixed = sum(key is not None for key in self._compiled)
        key = rows if rows > 0 and fixed < self._source.most else None
        if key not in self._compiled:
            self._compiled[key] = self._source.compiled(key)
        return self._compiled[key]

    def dtype_of(self, tensor: TensorInfo) -> np.dtype[Any]:
        """The NumPy type of an input; float32 for types that are not floating-point."""
        return np.dtype(next((kind for kind, named in _TYPES.items() if named == tensor.type), "float32"))

    def close(self) -> None:
        """Give the model's memory back; it cannot be run afterwards."""
        self._source, self._compiled = None, {}

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
        ``InputRejected`` for images that do not fit, or answers that are not logits.
        """
        values = np.ascontiguousarray(images, dtype=self.dtype)
        parts = min(self.at_once, len(values)) if self.batch_limits[1] is None else 1
        logits = np.concatenate(self.run_at_once(np.array_split(values, parts))) if parts > 1 else self.run(values)
        ensure_logits(logits, images, self.name)
        return logits.astype(np.float32)  # a copy: OpenVINO's own memory holds the next answer


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


@dataclass(frozen=True)
class _Compiled:
    """A compiled model: as many requests as run at once, and what it really computes in."""

    requests: list[Any]
    precision: str


@dataclass(frozen=True)
class _Source:
    """An OpenVINO graph that is compiled for this CPU, for at most ``most`` numbers of rows beside any number.

    ``digests`` are of its files, None where what it becomes is not kept.
    """

    graph: Any
    settings: OpenVinoSettings
    digests: list[str] | None
    most: int

    def compiled(self, rows: int | None) -> _Compiled:
        """The graph for ``rows`` rows of its input; None: as many as it takes."""
        network, settings = self._network(rows), self.settings
        many = int(network.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) if settings.hint == "throughput" else 1
        requests = [network.create_infer_request() for _ in range(many)]
        return _Compiled(requests, network.get_property("INFERENCE_PRECISION_HINT").to_string())

    def _network(self, rows: int | None) -> Any:
        """Compiled anew, or from the settings' ``cache``.

        OpenVINO's own cache (2026.4) loads a file of which a byte was changed, and answers wrongly: so it is not used.
        """
        core, blob = _core(), self._blob(rows)
        if blob is not None and (kept := kept_blob(blob)) is not None:
            try:
                return core.import_model(kept, "CPU", self.settings.properties())
            except RuntimeError:  # compiled by something that calls itself the same, and is not
                warn_of_dropped(blob, "OpenVINO does not take it here")
        if self.most:
            _reshape(self.graph, rows)
        network = core.compile_model(self.graph, "CPU", self.settings.properties())
        if blob is not None:
            keep_blob(blob, network.export_model().getvalue())
        return network

    def _blob(self, rows: int | None) -> Path | None:
        """Where what becomes of it is kept: named by all that decides it."""
        if self.settings.cache is None or self.digests is None:
            return None
        facts = [openvino_version(), self.settings.properties(), os.cpu_count(), rows]
        facts += [_core().get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        return self.settings.cache / f"{hashlib.sha256(json.dumps([facts, self.digests]).encode()).hexdigest()}.blob"


def _digests(model: Path | bytes, settings: OpenVinoSettings) -> list[str] | None:
    """Of the files of an IR that is kept when it is compiled; an ONNX file may name others that hold its weights."""
    if settings.cache is None or not isinstance(model, Path) or model.suffix != ".xml":
        return None
    return [digest(path) for path in (model, model.with_suffix(".bin"))]


def _most_compiled(graph: Any) -> int:
    """For how many numbers of rows ``graph`` is compiled; 0 where its rows are given, or cannot be."""
    shapes = [tensor.get_partial_shape() for tensor in graph.inputs]
    if (
        len(shapes) != 1
        or shapes[0].rank.is_dynamic
        or [axis.is_static for axis in shapes[0]] != [False] + [True] * (len(shapes[0]) - 1)
    ):
        return 0
    try:
        _reshape(graph, 1)
    except RuntimeError:  # it is as it was then
        return 0
    if any(_has_as_many_queries_as_heads(op) for op in graph.get_ops()):
        _reshape(graph, None)
        return 0
    weights = sum(op.get_byte_size() for op in graph.get_ops() if op.get_type_name() == "Constant")
    return int(min(MOST_COMPILED, max(1, MOST_BYTES // max(1, weights))))


def _has_as_many_queries_as_heads(op: Any) -> bool:
    """Whether ``op`` is of an attention that OpenVINO (2026.4, CPU) answers wrongly where its shape is known.

    Attention weights (b, heads, queries, tokens), or their products, with as many queries as heads: it fuses the transpose
    behind them with the two axes confused, or not at all. With a free batch it is right.
    """
    if op.get_type_name() not in ("Softmax", "ScaledDotProductAttention"):
        return False
    shape = op.get_output_partial_shape(0)
    return bool(shape.is_static and len(shape) == 4 and shape[1] == shape[2])


def _reshape(graph: Any, rows: int | None) -> None:
    _, *rest = graph.inputs[0].get_partial_shape()
    graph.reshape({0: [-1 if rows is None else rows, *(axis.get_length() for axis in rest)]})


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
