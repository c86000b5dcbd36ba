"""ONNX models in ONNX Runtime: the one place that opens its sessions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected, Unavailable, did_you_mean
from patchslim.packages import install_command
from patchslim.runner import BatchLimits, TensorInfo, ensure_logits, image_input

CPU: Final = "CPUExecutionProvider"
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


#: What every session is told. Threads that spin between runs would disturb whatever runs next in the same process.
SETTINGS: Final = {"session.intra_op.allow_spinning": "0"}


class OrtModel:
    """A model of any inputs and outputs in ONNX Runtime. Use it in a ``with`` block to give its memory back at the end.

    ``model`` is a file or a serialised model, ``name`` what messages call it (default: the file). ``threads`` 0 leaves their
    number to ONNX Runtime. Threads do not spin between runs: that would disturb whatever runs next in the same process.

    Raises ``Unavailable`` where ONNX Runtime, ``provider`` or an operator's kernel is not here, ``InputRejected`` where ONNX
    Runtime cannot load the model.
    """

    def __init__(self, model: Path | bytes, *, name: str = "", provider: str = CPU, threads: int = 0) -> None:
        self.name = name or (str(model) if isinstance(model, Path) else "the ONNX model")
        self.provider = provider
        self._session = _open(model, self.name, provider, threads)
        self.inputs = [_described(tensor) for tensor in self._session.get_inputs()]
        self.outputs = [_described(tensor) for tensor in self._session.get_outputs()]

    def dtype_of(self, tensor: TensorInfo) -> np.dtype[Any]:
        """The NumPy type of an input or output; float32 for types that NumPy does not have."""
        return np.dtype(_DTYPES.get(tensor.type, np.float32))

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        """Return the named ``outputs`` (None: all) for ``feeds``, arrays of the inputs' own types by name.

        Raises ``InputRejected`` where ONNX Runtime cannot run the model on them, or it is closed.
        """
        if self._session is None:
            raise InputRejected(f"{self.name}: it is closed")
        try:
            return list(self._session.run(None if outputs is None else list(outputs), dict(feeds)))
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feeds.items())
            raise InputRejected(f"{self.name}: ONNX Runtime cannot run it on {shapes}: {_first_line(error)}") from error

    def bound(self, values: Array) -> Callable[[], None]:
        """Return what runs the model on ``values``, its one input, laid where it is read: no copy is part of a run.

        Made for timing; the output is dropped.
        """
        import onnxruntime as ort

        device = "cuda" if self.provider.startswith("CUDA") else "cpu"
        source = ort.OrtValue.ortvalue_from_numpy(values.astype(self.dtype_of(self.inputs[0]), copy=False), device, 0)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self.inputs[0].name, source)
        for output in self.outputs:
            binding.bind_output(output.name, device)
        session = self._session
        return lambda: session.run_with_iobinding(binding)

    def close(self) -> None:
        """Give the model's memory back; it cannot be run afterwards."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class OrtRunner(OrtModel):
    """An image classifier in ONNX Runtime: a ``Runner``, opened as ``OrtModel`` is.

    Raises ``InputRejected``, beside ``OrtModel``'s, unless the model has one floating-point input (batch, channels, height,
    width) of which only the batch may be free.
    """

    def __init__(self, model: Path | bytes, *, name: str = "", provider: str = CPU, threads: int = 0) -> None:
        super().__init__(model, name=name, provider=provider, threads=threads)
        first = image_input(self.inputs, _DTYPES, self.name)
        self.batch_limits: BatchLimits = first.batch_limits
        self.image_shape: tuple[int, int, int] = first.image_shape
        self.dtype = self.dtype_of(self.inputs[0])

    def infer(self, images: Array) -> Array:
        """Return the first output, logits (b, classes) float32, for ``images`` (b, channels, height, width) of any float type.

        Raises ``InputRejected`` for images that do not fit, or answers that are not logits.
        """
        feed = np.ascontiguousarray(images, dtype=self.dtype)
        logits = self.run({self.inputs[0].name: feed}, [self.outputs[0].name])[0]
        ensure_logits(logits, images, self.name)
        return np.asarray(logits, dtype=np.float32)


def ensure_provider(provider: str) -> Any:
    """Return the module ``onnxruntime``; raises ``Unavailable`` where it is not installed or was built without ``provider``."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        fault = "is not installed" if error.name == "onnxruntime" else f"cannot be imported ({_first_line(error)})"
        raise Unavailable(f"ONNX Runtime {fault}; install it: {install_command('edge')}") from error
    if provider not in ort.get_available_providers():
        here = ort.get_available_providers()
        raise Unavailable(f"ONNX Runtime has no {provider} here; it has {', '.join(here)}{did_you_mean(provider, here)}")
    return ort


def _open(model: Path | bytes, name: str, provider: str, threads: int) -> Any:
    ort = ensure_provider(provider)
    if isinstance(model, Path) and not model.is_file():
        raise InputRejected(f"{name}: is not a file")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # its errors are raised, not logged as well
    for key, value in SETTINGS.items():
        options.add_session_config_entry(key, value)
    source = str(model) if isinstance(model, Path) else model
    try:
        # Left to itself ONNX Runtime answers a provider that fails to start by running on the CPU.
        session = ort.InferenceSession(source, options, providers=[provider], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        if type(error).__name__ == "NotImplemented":
            raise Unavailable(f"{name}: ONNX Runtime has no kernel for it on {provider}: {_first_line(error)}") from error
        raise InputRejected(f"{name}: ONNX Runtime cannot load it: {_first_line(error)}") from error
    if session.get_providers()[0] != provider:
        raise Unavailable(f"{provider} does not start here; ONNX Runtime offers {session.get_providers()[0]} instead")
    return session


def _described(tensor: Any) -> TensorInfo:
    shape = tuple(axis if isinstance(axis, int) else "batch" for axis in tensor.shape)
    return TensorInfo(tensor.name, tensor.type, shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
