"""Running a TensorRT engine on this machine's GPU.

Written against the Python API of TensorRT 10 and 11 and TensorRT-RTX 1.7. Only its refusals on a machine without a GPU have
been executed.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchslim import cuda
from patchslim.errors import InputRejected, Unavailable
from patchslim.runner import BatchLimits, TensorInfo
from patchslim.targets import target_for
from patchslim.tensorrt_caches import RuntimeCache, runtime_cache_file
from patchslim.tensorrt_weights import give_weights, stripped_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray


_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)"}


def can_execute(backend: str, targets: Sequence[str]) -> tuple[bool, str]:
    """Return whether an engine of ``backend`` for one of ``targets`` can run here, and the reason where it cannot."""
    local = cuda.local_target()
    if local is None:
        return False, "no CUDA driver or no visible GPU on this machine"
    if importlib.util.find_spec(backend) is None:
        return False, f"{backend} is not installed"
    if target_for(local, targets) is None:
        return False, f"this machine's GPU is {local}, the engine is for {', '.join(targets)}"
    return True, ""


def engine_faults(trt: Any, runtime: Any, plan: bytes) -> str:
    """What TensorRT-RTX's own check has against an engine, by its header alone; "" where it names nothing, or is not there.

    Without a driver it takes any engine for invalid, and names nothing.
    """
    check = getattr(runtime, "get_engine_validity", None)
    if check is None:  # full TensorRT
        return ""
    validity, diagnostics = check(plan)
    if validity != trt.EngineValidity.INVALID:
        return ""
    known = {name: int(getattr(trt.EngineInvalidityDiagnostics, name)) for name in trt.EngineInvalidityDiagnostics.__members__}
    named = [name.lower().replace("_", " ") for name, bit in known.items() if int(diagnostics) & bit]
    return ", ".join(named)


def narrowest_profile(profiles: Sequence[tuple[int, int]], batch: int, name: str) -> int:
    """The number of the optimisation profile, fewest and most images each, that takes ``batch`` with the fewest others.

    ``name`` is what messages call the engine. Raises ``InputRejected`` where none takes so many.
    """
    able = [(most - fewest, number) for number, (fewest, most) in enumerate(profiles) if fewest <= batch <= most]
    if not able:
        takes = profiles_in_words(profiles)
        raise InputRejected(
            f"{name}: {batch} images fit none of the engine's optimisation profiles: {takes}",
            next_step="give it as many at once, or build it with another --batch",
        )
    return min(able)[1]


def filled_batch(profiles: Sequence[tuple[int, int]], batch: int) -> int:
    """How many images to run ``batch`` images as: as many, or where they fall between two profiles, the fewest of the next."""
    if batch < min((fewest for fewest, _ in profiles), default=0):
        return batch
    return min((max(batch, fewest) for fewest, most in profiles if batch <= most), default=batch)


def profiles_in_words(profiles: Sequence[tuple[int, int]]) -> str:
    """What optimisation profiles take: "1, 8 to 32 images"."""
    return ", ".join(str(fewest) if fewest == most else f"{fewest} to {most}" for fewest, most in profiles) + " images"


class TrtRunner:
    """An engine on the first visible GPU, a ``Runner``: one input, images, and its first output, logits.

    ``model`` is a file or the bytes of one, ``name`` what messages call it (default: the file). ``weights`` is the ONNX file
    that it was built from, or its bytes: an engine file without weights needs it, and one that was built with ``--refit`` takes
    another of the same graph. ``cache`` is a folder in which what TensorRT-RTX compiles of the engine is kept. Raises
    ``InputRejected`` where a file is missing, or is not an engine of this release of ``backend`` for this GPU, or not of its
    weights; ``Unavailable`` where there is no GPU, or ``backend`` is not installed.
    """

    def __init__(
        self,
        model: Path | bytes,
        backend: str,
        *,
        name: str = "",
        weights: Path | bytes | None = None,
        cache: Path | None = None,
    ) -> None:
        path = name or (str(model) if isinstance(model, Path) else "the engine")
        if importlib.util.find_spec(backend) is None:
            raise Unavailable(f"{path}: {backend} is not installed, so the engine cannot run")
        for file in (model, weights):
            if isinstance(file, Path) and not file.is_file():
                raise InputRejected(f"{file}: no such file")
        self._stream = cuda.Stream()  # first: without a GPU, TensorRT answers with None or not at all
        self._trt: Any = importlib.import_module(backend)
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._logger)
        plan = model.read_bytes() if isinstance(model, Path) else model
        if faults := engine_faults(self._trt, self._runtime, plan):
            raise InputRejected(
                f"{path}: {backend} {self._trt.__version__} says of this engine, on {cuda.local_target()}: {faults}"
            )
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise InputRejected(
                f"{path}: not an engine that {backend} {self._trt.__version__} can load on {cuda.local_target()}"
            )
        if weights is not None:
            give_weights(self._trt, self._logger, self._engine, weights, path)
        elif lacking := stripped_bytes(self._trt, self._engine):
            raise InputRejected(
                f"{path}: the file is without its weights ({lacking} bytes)",
                next_step="pass the ONNX file that it was built from",
            )
        self._kernels: RuntimeCache | None = None
        if cache is not None and hasattr(self._trt, "IRuntimeCache"):  # full TensorRT compiles all when it builds
            self._kernels = RuntimeCache(self._engine, runtime_cache_file(cache, plan, self._trt.__version__))
        self._context = self._kernels.context if self._kernels else self._engine.create_execution_context()
        self._fresh = True
        self._turn = threading.Lock()  # the context holds the shape and addresses of one run
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = self._trt.TensorIOMode
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == mode.INPUT]
        self._outputs = [name for name in names if self._engine.get_tensor_mode(name) == mode.OUTPUT]
        if len(inputs) != 1 or not self._outputs:
            raise InputRejected(f"{path}: expected one input and an output, found {names}")
        self.name, self.input_name = path, inputs[0]
        self.inputs, self.outputs = [self._described(inputs[0])], [self._described(name) for name in self._outputs]
        self.input_shape = tuple(self._engine.get_tensor_shape(self.input_name))  # -1 where it is dynamic
        if len(self.input_shape) != 4 or min(self.input_shape[1:]) < 1:
            raise InputRejected(f"{path}: expected an input (batch, channels, height, width), found {self.inputs[0]}")
        self.image_shape: tuple[int, int, int] = self.input_shape[1], self.input_shape[2], self.input_shape[3]
        free = self.input_shape[0] < 0
        self.profiles = [self._profile(number) for number in range(self._engine.num_optimization_profiles)] if free else []
        self._chosen = 0  # what a new context has
        self._held: list[int] = []  # what lies on the GPU until the runner is closed
        self.dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(self.input_name)))

    def _profile(self, number: int) -> tuple[int, int]:
        """Fewest and most images of an optimisation profile."""
        fewest, _, most = self._engine.get_tensor_profile_shape(self.input_name, number)
        return int(fewest[0]), int(most[0])

    def _choose_profile(self, batch: int) -> None:
        """Take the narrowest profile for ``batch`` images. Raises ``InputRejected`` where none takes so many."""
        chosen = narrowest_profile(self.profiles, batch, self.name)
        if chosen != self._chosen:
            if not self._context.set_optimization_profile_async(chosen, self._stream.handle):
                raise Unavailable(f"{self.name}: the engine's optimisation profile {chosen} cannot be taken on the GPU")
            self._stream.wait()
            self._chosen = chosen

    def _described(self, name: str) -> TensorInfo:
        kind = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))).name
        shape = tuple(int(size) if size >= 0 else "batch" for size in self._engine.get_tensor_shape(name))
        return TensorInfo(name, _TYPES.get(kind, f"tensor({kind})"), shape)

    @property
    def batch_limits(self) -> BatchLimits:
        """Fewest and most images that one run takes: the fixed batch, or those of all optimisation profiles."""
        if self.input_shape[0] > 0:
            return self.input_shape[0], self.input_shape[0]
        return min(fewest for fewest, _ in self.profiles), max(most for _, most in self.profiles)

    def infer(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return logits (b, classes) float32 for ``images`` (b, channels, height, width), cast to the engine's type.

        A batch between two optimisation profiles is filled up by repeating its last image. Threads take turns. Raises
        ``InputRejected`` where the shape lies outside the engine's optimisation profiles, ``Unavailable`` where the GPU fails.
        """
        with self._turn:
            return self._inferred(images)[: len(images)]

    def _inferred(self, images: NDArray[Any]) -> NDArray[np.float32]:
        results, addresses = self._bound(images)
        try:
            self._execute()
            for array, address in zip(results, addresses[1:], strict=True):
                self._stream.download(array, address)
            if self._kernels and self._fresh:  # most of what will be compiled; close keeps the rest
                self._kernels.keep()
                self._fresh = False
        finally:
            for address in addresses:
                self._stream.free(address)
        return np.asarray(results[0], dtype=np.float32)

    def timed(self, values: NDArray[Any]) -> Callable[[], float]:
        """Copy ``values`` to the GPU, and return a function that runs the engine on them once and returns the GPU's seconds.

        The time is measured between two events around the run, so it includes no copies and no work of the CPU before it.
        Raises ``InputRejected`` where the shape lies outside the engine's optimisation profile, ``Unavailable`` where the GPU
        fails; the returned function raises ``Unavailable`` too.
        """
        self._held.extend(self._bound(values)[1])
        start, end = self._stream.event(), self._stream.event()

        def seconds() -> float:
            self._stream.record(start)
            self._execute()
            self._stream.record(end)
            return self._stream.seconds_between(start, end)

        return seconds

    def _bound(self, values: NDArray[Any]) -> tuple[list[NDArray[Any]], list[int]]:
        """Arrays for the outputs of a run on ``values``, and where its input and these are on the GPU, in this order.

        Of a batch between two optimisation profiles these are for as many images as it is filled up to.
        """
        if self._engine is None:
            raise InputRejected(f"{self.name}: it is closed")
        more = filled_batch(self.profiles, len(values)) - len(values)
        filled = np.concatenate([values, np.repeat(values[-1:], more, axis=0)]) if more else values
        source = np.ascontiguousarray(filled, dtype=self.dtype)
        if self.profiles:
            self._choose_profile(len(source))
        if not self._context.set_input_shape(self.input_name, source.shape):
            raise InputRejected(f"{self.name}: an input of shape {source.shape} lies outside the engine's optimisation profile")
        results = [
            np.empty(tuple(self._context.get_tensor_shape(name)), dtype=self._trt.nptype(self._engine.get_tensor_dtype(name)))
            for name in self._outputs
        ]
        addresses: list[int] = []
        try:
            for name, array in zip([self.input_name, *self._outputs], [source, *results], strict=True):
                addresses.append(self._stream.allocate(array.nbytes))
                self._context.set_tensor_address(name, addresses[-1])
            self._stream.upload(addresses[0], source)
            self._stream.wait()  # until then the source must stay
        except Unavailable:
            for address in addresses:
                self._stream.free(address)
            raise
        return results, addresses

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise Unavailable(f"{self.name}: the engine failed on the GPU")

    def close(self) -> None:
        """Free the GPU's memory; the runner cannot be run afterwards."""
        with self._turn:
            if self._engine is None:
                return
            for address in self._held:
                self._stream.free(address)
            if self._kernels:
                self._kernels.keep()
            self._context = self._kernels = self._engine = self._runtime = None  # in this order
            self._stream.close()
