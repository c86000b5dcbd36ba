"""Models in OpenVINO, on the CPU: the one place that compiles them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from patchslim.arrays import Array
from patchslim.blob_cache import keep_blob, kept_blob
from patchslim.errors import InputRejected, Unavailable
from patchslim.files import digest
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.packages import install_command
from patchslim.runner import BatchLimits, TensorInfo, ensure_logits, image_input

_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "float64": "tensor(double)"}
_DEFAULT = OpenVinoSettings()


class OpenVinoModel:
    """A model of one input in OpenVINO. Use it in a ``with`` block to give its memory back at the end.

    ``model`` is an ONNX file, the XML file of an OpenVINO IR with its BIN file beside it, or the bytes of either; then
    ``weights`` are the bytes of the BIN file. ``name`` is what messages call it (default: the file). Raises ``Unavailable``
    without OpenVINO, ``InputRejected`` where it cannot load the model.
    """

    def __init__(
        self, model: Path | bytes, settings: OpenVinoSettings = _DEFAULT, *, weights: bytes | None = None, name: str = ""
    ) -> None:
        self.name = name or (str(model) if isinstance(model, Path) else "the model")
        core = _core()
        if isinstance(model, Path) and not model.is_file():
            raise InputRejected(f"{self.name}: is not a file")
        try:
            compiled = _compiled(core, model, weights, settings)
            self.inputs = [_described(tensor) for tensor in compiled.inputs]
            self.outputs = [_described(tensor) for tensor in compiled.outputs]
            self.precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
            many = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) if settings.hint == "throughput" else 1
            self._requests = [compiled.create_infer_request() for _ in range(many)]
        except Exception as error:  # OpenVINO raises RuntimeError and kin of every kind
            raise InputRejected(f"{self.name}: OpenVINO cannot load it: {_last_line(error)}") from error

    def run(self, values: Array) -> Array:
        """The first output for ``values``, an array of the input's type, in OpenVINO's own memory: the next run overwrites it.

        Raises ``InputRejected`` where OpenVINO cannot run the model on them.
        """
        shared = self.at_once == 1  # what one of several requests shares is read by the others as well (2026.4)
        try:
            return np.asarray(self._requests[0].infer({0: values}, share_inputs=shared)[0])
        except Exception as error:
            raise InputRejected(f"{self.name}: OpenVINO cannot run it on {values.shape}: {_last_line(error)}") from error

    @property
    def at_once(self) -> int:
        """How many batches it runs at once: 1 by the hint latency, what OpenVINO finds best here by throughput."""
        return len(self._requests)

    def run_at_once(self, parts: Sequence[Array]) -> list[Array]:
        """The first output for each of ``parts``, at most ``at_once`` arrays of the input's type.

        Raises ``InputRejected`` where OpenVINO cannot run the model on one of them.
        """
        running, failed = self._requests[: len(parts)], None
        for request, part in zip(running, parts, strict=True):
            request.start_async({0: part})
        for request, part in zip(running, parts, strict=True):
            try:
                request.wait()
            except Exception as error:  # not raised before the others have ended
                failed = failed or (part.shape, error)
        if failed is not None:
            raise InputRejected(f"{self.name}: OpenVINO cannot run it on {failed[0]}: {_last_line(failed[1])}") from failed[1]
        return [request.get_output_tensor(0).data.copy() for request in running]

    def dtype_of(self, tensor: TensorInfo) -> np.dtype[Any]:
        """The NumPy type of an input; float32 for types that are not floating-point."""
        return np.dtype(next((kind for kind, named in _TYPES.items() if named == tensor.type), "float32"))

    def close(self) -> None:
        """Give the model's memory back; it cannot be run afterwards."""
        self._requests = []

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


def _compiled(core: Any, model: Path | bytes, weights: bytes | None, settings: OpenVinoSettings) -> Any:
    """``model``, compiled for this CPU; an IR's is kept in the ``cache``, if there is one.

    OpenVINO's own cache (2026.4) loads a file of which a byte was changed, and answers wrongly: so it is not used.
    """
    source = str(model) if isinstance(model, Path) else model
    beside = {} if weights is None else {"weights": weights}
    blob = _blob(core, model, settings)
    if blob is not None and (kept := kept_blob(blob)) is not None:
        with contextlib.suppress(RuntimeError):  # compiled by something that calls itself the same, and is not
            return core.import_model(kept, "CPU", settings.properties())
    compiled = core.compile_model(core.read_model(model=source, **beside), "CPU", settings.properties())
    if blob is not None:
        keep_blob(blob, compiled.export_model().getvalue())
    return compiled


def _blob(core: Any, model: Path | bytes, settings: OpenVinoSettings) -> Path | None:
    """Where what becomes of the IR ``model`` is kept: named by all that decides it. None without a cache, or for an ONNX file.

    An ONNX file may name others that hold its weights.
    """
    if settings.cache is None or not isinstance(model, Path) or model.suffix != ".xml":
        return None
    facts = [openvino_version(), settings.properties(), os.cpu_count()]
    facts += [core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    digests = [digest(path) for path in (model, model.with_suffix(".bin"))]
    return settings.cache / f"{hashlib.sha256(json.dumps([facts, digests]).encode()).hexdigest()}.blob"


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
