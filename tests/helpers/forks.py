"""Processes forked from one that has imported PyTorch: a command line, or two processes of one job.

Starting Python anew costs seconds of imports for each; ``tests/project/test_imagenet_page.py`` runs torchrun itself.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

IMPORTED = ["torch", "timm", "accelerate", "slimming.api", "slimming.fitting.finetune", "tests.helpers.timm_models"]
LIMIT_SECONDS = 300


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _run_command(module: str, arguments: list[str], stdout: Path, stderr: Path) -> None:
    os.setsid()
    for descriptor, path in ((1, stdout), (2, stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start_command(arguments: list[str], stdout: Path, stderr: Path) -> BaseProcess:
    """Start ``[python, "-m", module, ...]`` as the leader of a process group of its own, its output written to two files."""
    _, dash_m, module, *rest = arguments
    assert dash_m == "-m"
    process = _context().Process(target=_run_command, args=(module, rest, stdout, stderr))
    process.start()
    return process


def run_command(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run such a command to its end; ``folder`` takes what it writes."""
    stdout, stderr = folder / "stdout.txt", folder / "stderr.txt"
    process = start_command(arguments, stdout, stderr)
    process.join(LIMIT_SECONDS)
    process.kill()
    texts = [path.read_text(encoding="utf-8") for path in (stdout, stderr)]
    return subprocess.CompletedProcess(arguments, -1 if process.exitcode is None else process.exitcode, *texts)


def _run_task(task: Callable[[Path], None], folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    try:
        task(folder)
    except BaseException:
        (folder / f"failed-{environment['RANK']}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def run_in_two_processes(task: Callable[[Path], None], folder: Path) -> None:
    """Call ``task(folder)`` in two processes with the environment that torchrun gives ranks 0 and 1, and fail as they do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        _context().Process(target=_run_task, args=(task, folder, {**job, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_SECONDS)
    for process in processes:
        process.kill()  # one that waits for another that has failed
    said = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("failed-*.txt")))
    assert [process.exitcode for process in processes] == [0, 0], said
