"""A stranger's model run in a process of its own, which is ended when it takes too long and may have only so much memory."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import EXIT_UNAVAILABLE, InputRejected, Unavailable
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.ort_runner import CPU
from patchslim.runner import BatchLimits, TensorInfo
from validate.engine_runs import OnnxWeights
from validate.manifest import FileRecord
from validate.worker import receive, send

_GIB = 1 << 30
_BASE_MEMORY = 4 * _GIB  # Python, ONNX Runtime, activations of a batch
_MEMORY_PER_BYTE = 4  # of weights: read, parsed, loaded; a model of ViT-L's size, 1.2 GB, had 3.7 GB in all at its peak
_REPLY_BYTES = 1 << 30
_ON_CPU = ("onnxruntime", "openvino")
_OPENVINO = OpenVinoSettings()


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one model may take: ``timeout`` seconds for loading and the golden inputs, or for a batch of other images.

    ``memory`` is in bytes: 0 for no bound, None for 4 GiB and four times the bundle's files, or those beside a file that is of
    no bundle. What runs on a GPU has no bound of memory, since that is not the process's.
    """

    timeout: float = 300.0
    memory: int | None = None


class Listed(Protocol):
    """A record with the sizes and digests of a folder's files: a manifest, or ``build.json``."""

    @property
    def files(self) -> list[FileRecord]:
        """Every file that a model may be read from."""


class IsolatedRunner:
    """An ONNX file in ONNX Runtime, as ``OrtRunner`` is, but in another process, which reads and checks it.

    Of a bundle it loads exactly the bytes that the ``manifest`` has the digests of; None: ``path`` is a file of no bundle, or
    is taken as it is. ``backend`` is the module that runs it: ``onnxruntime``, ``openvino`` (an ONNX file or an IR, by
    those settings), and for an engine ``tensorrt`` or ``tensorrt_rtx``, with the ``weights`` that its file lacks. Use it in a
    ``with`` block. Raises ``InputRejected`` where the file is not those, does not run, or takes more than ``limits``;
    ``Unavailable`` as ``OrtRunner`` does.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Listed | None,
        path: str,
        limits: Limits,
        *,
        provider: str = CPU,
        threads: int = 0,
        backend: str = "onnxruntime",
        openvino: OpenVinoSettings = _OPENVINO,
        weights: OnnxWeights | None = None,
    ):
        self.name = str(folder / path)
        self._limits = limits
        self._private = tempfile.TemporaryDirectory(prefix="patchslim-validate-")
        files = None if manifest is None else [(file.path, file.size, file.sha256) for file in manifest.files]
        sizes = _bytes_beside(folder) if files is None else sum(size for name, size, _ in files if not name.endswith(".engine"))
        memory = _BASE_MEMORY + _MEMORY_PER_BYTE * sizes if limits.memory is None else limits.memory
        self._memory = memory if provider == CPU and backend in _ON_CPU else 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "validate.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place)},
        )
        task = {
            "folder": str(folder.absolute()),
            "path": path,
            "files": files,
            "private": self._private.name,
            "provider": provider,
            "threads": threads,
            "memory": self._memory,
            "backend": backend,
            "openvino": dataclasses.asdict(openvino),
            "weights": None if weights is None else weights.listed(),
            "cache": None,
        }
        self.renew()
        try:
            opened, _ = self._ask(task)
        except BaseException:
            self.close()
            raise
        self.inputs, self.outputs = (_tensors(opened[key]) for key in ("inputs", "outputs"))
        fewest, most = opened["limits"]
        self.batch_limits: BatchLimits = (fewest, most)

    def renew(self) -> None:
        """Give the model its whole time again, from now."""
        self._deadline = time.monotonic() + self._limits.timeout

    def infer(self, images: Array) -> Array:
        """Return logits (b, classes) float32 for ``images`` (b, channels, height, width); raises as the class does."""
        values = np.ascontiguousarray(images, dtype=np.float32)
        header, payload = self._ask({"shape": values.shape}, values.tobytes())
        shape = tuple(header["shape"])
        if len(shape) != 2 or shape[0] != len(images) or math.prod(shape) * 4 != len(payload):
            raise InputRejected(f"{self.name}: answers with shape {shape} for {len(images)} images, not (images, classes)")
        return np.frombuffer(payload, dtype=np.float32).reshape(shape)

    def timed(self, batch: int, *, wall: bool = False) -> Callable[[], float]:
        """Return what runs the model once on ``batch`` random images and gives the seconds that it took, as it counts them.

        CPU time with one thread on the CPU unless ``wall`` is asked for, the GPU's time of a TensorRT engine, else wall time;
        nothing that passes between the processes is counted. Each run has the whole time of ``limits``.
        """
        self.renew()
        self._ask({"prepare": batch, "wall": wall})

        def seconds() -> float:
            self.renew()
            return float(self._ask({"run": True})[0]["seconds"])

        return seconds

    def _ask(self, header: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        process, late = self._process, threading.Event()
        assert process.stdin is not None
        assert process.stdout is not None

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(max(0.0, self._deadline - time.monotonic()), end)
        timer.daemon = True
        timer.start()
        try:
            send(process.stdin, header, payload)
            reply, answer = receive(process.stdout, _REPLY_BYTES)
        except (EOFError, OSError) as error:
            code = None if late.is_set() else _ended(process)
            raise InputRejected(f"{self.name}: {self._fault(code)}") from error
        finally:
            timer.cancel()
        if "error" in reply:
            kind = Unavailable if reply["exit_code"] == EXIT_UNAVAILABLE else InputRejected
            raise kind(str(reply["error"]))
        return reply, answer

    def _fault(self, code: int | None) -> str:
        """Why the process ended: ``code`` is what it ended with, None where it was late."""
        if code is None:
            return f"did not answer within {self._limits.timeout:g} s; a slow machine needs a larger --timeout"
        bound = f"it may have {self._memory / _GIB:.3g} GiB of memory (--memory)" if self._memory else "its memory has no bound"
        return f"the process that ran it ended with {'signal' if code < 0 else 'code'} {abs(code)}; {bound}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:  # what was not sent is not wanted any more
                pass
        self._private.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=5)
    except subprocess.TimeoutExpired:  # it answers nonsense
        process.kill()
        return process.wait()


def _bytes_beside(folder: Path) -> int:
    """Bytes of the files in ``folder``, among which a model's weights are."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return 0


def _tensors(described: Sequence[Sequence[Any]]) -> list[TensorInfo]:
    return [TensorInfo(name, kind, tuple(shape)) for name, kind, shape in described]
