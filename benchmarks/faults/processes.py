"""Commands in processes of their own that are hurt at a chosen moment. Linux only: moments are read from ``/proc``."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from patchslim.interrupts import SIGNALS, end_when_interrupted

#: Seconds that a process has to end once it was told to, or in all; one that does not counts as hung.
GRACE, LIMIT = 60.0, 120.0
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Door:
    """A command: the module of its door, and its arguments."""

    module: str
    arguments: Sequence[str]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), what it said on stderr, and the seconds that it took."""

    code: int
    said: str
    hung: bool
    seconds: float

    @property
    def traceback(self) -> bool:
        """Whether it showed one."""
        return "Traceback (most recent call last)" in self.said


class Running:
    """A command that runs; ``fresh`` is a Python of its own, else it is forked from this process, which has loaded PyTorch.

    ``max_file_bytes`` is the largest file that it may write.
    """

    def __init__(self, door: Door, log: Path, *, fresh: bool = False, max_file_bytes: int | None = None) -> None:
        self._log, self._began = log, time.monotonic()
        self._status: int | None = None
        self.pid = _start(door, log, max_file_bytes) if fresh else _fork(door, log, max_file_bytes)

    def await_ready(self) -> None:
        """Wait until it handles SIGTERM, which is the first thing that it does, or has ended."""
        while not _handles(self.pid, signal.SIGTERM) and time.monotonic() - self._began < GRACE:
            time.sleep(0.002)

    def hurt(self, number: int, after: float) -> None:
        """Send it a signal ``after`` seconds from now."""
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it has ended."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def wait(self, seconds: float = LIMIT) -> Ended:
        """Wait for its end; kill it where it does not come."""
        until, hung = time.monotonic() + seconds, False
        while not self.ended():
            if time.monotonic() > until:
                hung = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        assert self._status is not None
        took = time.monotonic() - self._began
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # workers that a killed one left
        return Ended(os.waitstatus_to_exitcode(self._status), self._log.read_text(errors="replace"), hung, took)


def preload() -> None:
    """Load in this process what the commands load, so that a forked one begins with its work.

    Without threads of its own: a forked process has none of them, and would wait for them forever.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in (
        "torch",
        "timm",
        "onnx",
        "onnxruntime",
        "sklearn.datasets",
        "matplotlib.pyplot",
        "safetensors.torch",
        "jinja2",
    ):
        import_module(name)
    import_module("torch").set_num_threads(1)
    for name in ("export.pipeline", "export.summary", "slimming.pipeline", "graph_passes.pass_manager", "validate.check"):
        import_module(name)
    for name in ("export.run", "slimming.run", "graph_passes.run", "validate.run", "export.kept_patches", "validate.report"):
        import_module(name)
    _load_exporter()


def _load_exporter() -> None:
    """Export a model of one block: PyTorch's exporter loads most of itself, for seconds, when it is first used."""
    import timm

    from export.onnx_export import export_dense

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=6, num_heads=1).eval()
    with tempfile.TemporaryDirectory() as folder:
        export_dense(model, (3, 32, 32), Path(folder) / "model.onnx")


def _start(door: Door, log: Path, max_file_bytes: int | None) -> int:
    def limit() -> None:
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    with log.open("wb") as said:
        command = [sys.executable, "-m", door.module, *door.arguments]
        return subprocess.Popen(  # waited for by its number
            command, cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True, preexec_fn=limit
        ).pid


def _fork(door: Door, log: Path, max_file_bytes: int | None) -> int:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the new process has handlers of its own
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 1
    try:
        os.setsid()
        said, nothing = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.dup2(said, 2)
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        sys.argv = [door.module, *door.arguments]
        end_when_interrupted()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = import_module(door.module).main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _handles(pid: int, number: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    caught, blocked = (int(fields.get(name, "0"), 16) >> (number - 1) & 1 for name in ("SigCgt", "SigBlk"))
    return fields.get("State", "").startswith("Z") or bool(caught and not blocked)
