"""The process that runs one model for ``validate.isolated``, with a bound on its memory: ``-m validate.worker``."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from patchslim.errors import EXIT_REJECTED, EXIT_UNAVAILABLE, InputRejected, PatchslimError
from patchslim.packages import install_command
from validate.model import Model, open_model

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
        runner = open_model(task)
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


def _prepared(runner: Model, batch: int, task: dict[str, Any], *, wall: bool) -> Callable[[], float]:
    """What runs the model once on ``batch`` random images and gives the seconds by the clock that is fair to it."""
    import numpy as np

    from patchslim.ort_runner import CPU
    from patchslim.timing import fair_clock, timed

    fewest, most = runner.batch_limits
    if batch < fewest or (most is not None and batch > most):
        takes = f"has the fixed batch size {fewest}" if fewest == most else f"takes batches from {fewest} to {most or 'any'}"
        raise InputRejected(f"{runner.name}: {takes}, not {batch}")
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
