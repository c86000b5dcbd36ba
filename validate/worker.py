"""The process that runs one model for ``validate.isolated``, with a bound on its memory: ``-m validate.worker``."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from patchslim.errors import EXIT_REJECTED, EXIT_UNAVAILABLE, InputRejected, PatchslimError
from patchslim.packages import install_command

if TYPE_CHECKING:
    from typing import Protocol

    from patchslim.ort_runner import TensorInfo
    from patchslim.runner import Runner

    class Model(Runner, Protocol):
        """What runs here: a runner that says what it takes and gives."""

        @property
        def inputs(self) -> list[TensorInfo]:
            """The input."""

        @property
        def outputs(self) -> list[TensorInfo]:
            """The outputs, logits first."""

        @property
        def image_shape(self) -> tuple[int, int, int]:
            """Channels, height, width."""

        @property
        def dtype(self) -> Any:
            """NumPy's type of the input."""


_HEADER_BYTES = 1 << 20


def send(stream: IO[bytes], header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one message: a line of JSON that says how many bytes follow it, and those."""
    stream.write(json.dumps(header | {"bytes": len(payload)}).encode() + b"\n")
    stream.write(payload)
    stream.flush()


def receive(stream: IO[bytes], limit: int) -> tuple[dict[str, Any], bytes]:
    """Read what ``send`` wrote; raises ``EOFError`` where it ends early or is longer than ``limit`` bytes."""
    line = stream.readline(_HEADER_BYTES)
    if not line.endswith(b"\n"):
        raise EOFError
    header: dict[str, Any] = json.loads(line)
    size = int(header["bytes"])
    payload = stream.read(size) if size <= limit else b""
    if len(payload) != size:
        raise EOFError
    return header, payload


def limit_memory(most: int) -> None:
    """Let this process have at most ``most`` bytes of memory of its own; no core file is written if that ends it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind in (resource.RLIMIT_DATA,):  # not the address space, of which threads reserve far more than they use
        hard = resource.getrlimit(kind)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bound, hard))


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Open the model that the first message names, and answer every further one: images with logits, a run with its time."""
    task, _ = receive(requests, 0)
    try:
        if task["memory"]:
            limit_memory(task["memory"])
        runner = _open(task)
        send(replies, {"inputs": runner.inputs, "outputs": runner.outputs, "limits": runner.batch_limits})
        import numpy as np

        timed_run: Callable[[], float] | None = None
        while True:
            header, payload = receive(requests, sys.maxsize)
            if "prepare" in header:
                timed_run = _prepared(runner, header["prepare"], task, wall=header["wall"])
                send(replies, {})
            elif "run" in header and timed_run is not None:
                send(replies, {"seconds": timed_run()})
            else:
                logits = runner.infer(np.frombuffer(payload, dtype=np.float32).reshape(header["shape"]))
                send(replies, {"shape": logits.shape}, np.ascontiguousarray(logits).tobytes())
    except EOFError:  # the parent is done
        return
    except PatchslimError as error:
        send(replies, {"error": str(error), "exit_code": error.exit_code})
    except ImportError as error:
        send(replies, {"error": f"{error}; install it: {install_command('edge')}", "exit_code": EXIT_UNAVAILABLE})
    except MemoryError:
        send(replies, {"error": f"{task['path']}: needs more memory than it may have", "exit_code": EXIT_REJECTED})


def _open(task: dict[str, Any]) -> Model:
    """The model in its engine, from the bytes that were checked: in memory, or in a folder of its own with its weights."""
    from patchslim.files import copy_verified, read_verified

    if task["backend"] in ("tensorrt", "tensorrt_rtx"):
        from patchslim.tensorrt_runner import TrtRunner

        path = Path(task["folder"]) / task["path"]
        return TrtRunner(read_verified(path, *_listed(task, task["path"])), task["backend"], name=str(path))
    if task["path"].endswith(".xml"):
        return _opened_ir(task)
    from validate.onnx_file import beside, check_onnx, check_onnx_bytes

    folder, name = Path(task["folder"]), task["path"]
    if task["files"] is None:
        check_onnx(folder / name)
        return _loaded(folder / name, str(folder / name), task)
    files = {path: (size, sha256) for path, size, sha256 in task["files"]}
    inside = beside(name, files)
    path = folder / name
    data = read_verified(path, *files[name])
    needed = check_onnx_bytes(data, path, set(inside))
    model: Path | bytes = data
    if needed:
        private = Path(task["private"])
        for location in needed:
            to = private / location
            to.parent.mkdir(parents=True, exist_ok=True)
            copy_verified(folder / inside[location], *files[inside[location]], to)
        model = private / f"{hashlib.sha256(data).hexdigest()}.onnx"
        model.write_bytes(data)
    return _loaded(model, str(path), task)


def _listed(task: dict[str, Any], path: str) -> tuple[int, str]:
    """Size and digest that a file must have; raises ``InputRejected`` where the record of the folder lacks it."""
    for name, size, sha256 in task["files"]:
        if name == path:
            return size, sha256
    raise InputRejected(f"{Path(task['folder']) / path}: is not listed, and the model needs it")


def _opened_ir(task: dict[str, Any]) -> Model:
    """An OpenVINO IR from the bytes of its two files that were checked."""
    from patchslim.files import read_verified
    from patchslim.openvino_runner import OpenVinoRunner

    folder = Path(task["folder"])
    names = task["path"], task["path"].removesuffix(".xml") + ".bin"
    xml, weights = (read_verified(folder / name, *_listed(task, name)) for name in names)
    path = str(folder / task["path"])
    return OpenVinoRunner(xml, weights=weights, name=path, threads=task["threads"], precision=task["precision"])


def _loaded(model: Path | bytes, name: str, task: dict[str, Any]) -> Model:
    """An ONNX model in the engine that is asked for."""
    if task["backend"] == "openvino":
        from patchslim.openvino_runner import OpenVinoRunner

        return OpenVinoRunner(model, name=name, threads=task["threads"], precision=task["precision"])
    from patchslim.ort_runner import OrtRunner

    return OrtRunner(model, name=name, provider=task["provider"], threads=task["threads"])


def _prepared(runner: Model, batch: int, task: dict[str, Any], *, wall: bool) -> Callable[[], float]:
    """What runs the model once on ``batch`` random images and gives the seconds by the clock that is fair to it."""
    import numpy as np

    from patchslim.ort_runner import CPU
    from patchslim.timing import fair_clock, timed

    fewest, most = runner.batch_limits
    if batch < fewest or (most is not None and batch > most):
        raise InputRejected(f"{runner.name}: has the fixed batch size {fewest}, not {batch}")
    values = np.random.default_rng(0).standard_normal((batch, *runner.image_shape)).astype(runner.dtype)
    if (on_gpu := getattr(runner, "timed", None)) is not None:
        gpu_seconds: Callable[[], float] = on_gpu(values)
        return gpu_seconds
    clock = time.perf_counter if wall else fair_clock(task["threads"], on_cpu=task["provider"] == CPU)
    return timed(lambda: runner.infer(values), clock)


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, whatever the model is doing."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Answer on what was stdout; whatever else would be written there is dropped."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    serve(requests, replies)


if __name__ == "__main__":
    main()
