"""A function run by two processes of one job, as torchrun would start them, without importing PyTorch anew in each.

A server process imports it once and forks; ``tests/project/test_imagenet_page.py`` runs torchrun itself.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

IMPORTED = ["torch", "timm", "accelerate", "slimming.api", "slimming.fitting.finetune", "tests.helpers.timm_models"]
LIMIT_SECONDS = 300


def _start(task: Callable[[Path], None], folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    try:
        task(folder)
    except BaseException:
        (folder / f"failed-{environment['RANK']}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def run_in_two_processes(task: Callable[[Path], None], folder: Path) -> None:
    """Call ``task(folder)`` in two processes with the environment of ranks 0 and 1, and fail as they do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        context.Process(target=_start, args=(task, folder, {**job, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
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
