"""A model that is timed in a process of its own: ``python -m benchmarks.speed.contender``, spoken to in JSON lines.

The first line is a ``Contender``. After it each line asks for one thing: ``{"time": BATCH}`` runs a batch twice and answers
``{"seconds": ...}`` of the second run, ``{"answers": BATCH}`` answers all ``images`` with their classes. What fails has a
``fault`` in place of an answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from patchslim.arrays import Array
from patchslim.environment import let_idle_threads_sleep

if TYPE_CHECKING:
    from patchslim.choices import InferencePrecision

Kind = Literal["onnxruntime", "openvino", "torch", "torch.compile", "gemm"]
#: Multiplications of one GEMM rate: the largest of these sides counts, so that it is a limit.
_GEMM_SIDES = (512, 1024, 2048)


@dataclass(frozen=True)
class Contender:
    """What is timed: its name, group and file, and what is known of it before.

    ``files`` are ONNX files of a fixed batch each, by batch; of PyTorch one module, pickled, under any batch. ``images`` is a
    .npy file (n, channels, height, width) float32. ``macs`` are multiply-accumulates of one image, ``multiplies`` the type that
    its matrix products are in.
    """

    name: str
    group: str
    kind: Kind
    files: dict[int, str] = field(default_factory=dict, hash=False)
    images: str = ""
    threads: int = 1
    macs: int = 0
    multiplies: str = "fp32"
    precision: InferencePrecision = "f32"


class ContenderProcess:
    """A ``Contender`` in a process of its own. Use it in a ``with`` block. Raises ``RuntimeError`` where it cannot answer."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        command = [sys.executable, "-m", "benchmarks.speed.contender"]
        threads = {name: str(contender.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | threads
        )
        self._tell(asdict(contender))

    def seconds(self, batch: int) -> float:
        """Wall time of one warm run of ``batch`` images; of ``gemm`` per multiply-accumulate."""
        return float(self._ask({"time": batch})["seconds"])

    def answers(self, batch: int) -> list[int]:
        """The class of each image, as far as whole batches go."""
        return list(map(int, self._ask({"answers": batch})["answers"]))

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        self._tell(what)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"fault": "its process ended"}
        if "fault" in found:
            raise RuntimeError(f"{self.contender.name}: {found['fault']}")
        return found

    def _tell(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(f"{self.contender.name}: its process ended") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # of what it was not there to read
                assert stream is not None
                stream.close()


#: Takes images (batch, channels, height, width), gives logits (batch, classes).
Answer = Callable[[Array], Array]


def opened(contender: Contender, batch: int) -> Answer:
    """What answers a batch of images."""
    path = Path(contender.files[batch])
    if contender.kind == "onnxruntime":
        from patchslim.ort_runner import OrtRunner

        return OrtRunner(path, threads=contender.threads).infer
    if contender.kind == "openvino":
        from patchslim.openvino_runner import OpenVinoRunner
        from patchslim.openvino_settings import OpenVinoSettings

        return OpenVinoRunner(path, OpenVinoSettings(contender.precision, threads=contender.threads)).infer
    import torch

    torch.set_num_threads(contender.threads)
    module = torch.load(path, weights_only=False).eval()
    if contender.kind == "torch.compile":
        module = torch.compile(module, dynamic=False)

    def answer(images: Array) -> Array:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(images)).float().numpy())

    return answer


def gemm_seconds(contender: Contender) -> float:
    """Seconds per multiply-accumulate of a square matrix product: the best of a few sizes and of every library here."""
    found = []
    for side in _GEMM_SIDES:
        for product in _products(contender, side):
            product()
            start = time.perf_counter()
            product()
            found.append((time.perf_counter() - start) / side**3)
    return min(found)


@cache
def _products(contender: Contender, side: int) -> list[Callable[[], object]]:
    """Products of two matrices of ``side``, one of them a constant where a library packs those in advance."""
    import torch

    from patchslim.openvino_runner import OpenVinoModel
    from patchslim.openvino_settings import OpenVinoSettings
    from patchslim.ort_runner import OrtModel

    torch.set_num_threads(contender.threads)
    left, right = (np.random.default_rng(seed).standard_normal((side, side), dtype=np.float32) for seed in (0, 1))
    dtype = torch.bfloat16 if contender.multiplies == "bf16" else torch.float32
    model, threads = _product_model(right), contender.threads
    products: list[Callable[[], object]] = [
        partial(torch.matmul, *(torch.from_numpy(factor).to(dtype) for factor in (left, right))),
        partial(OpenVinoModel(model, OpenVinoSettings(contender.precision, threads=threads), name="GEMM").run, left),
    ]
    if contender.multiplies == "fp32":
        products.append(partial(np.matmul, left, right))
        products.append(partial(OrtModel(model, threads=threads, name="GEMM").run, {"x": left}))
    return products


def _product_model(right: Array) -> bytes:
    """An ONNX model that multiplies ``x`` by a constant."""
    from onnx import TensorProto, helper, numpy_helper

    node, shape = helper.make_node("MatMul", ["x", "right"], ["y"]), list(right.shape)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [numpy_helper.from_array(right, "right")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def serve() -> None:
    """Answer what stdin asks, until it ends."""
    let_idle_threads_sleep()
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    first = json.loads(sys.stdin.readline())
    contender = Contender(**(first | {"files": {int(batch): path for batch, path in first["files"].items()}}))
    images = np.load(contender.images, mmap_mode="r") if contender.images else None
    models: dict[int, Answer] = {}

    def model(batch: int) -> Answer:
        if batch not in models:
            models[batch] = opened(contender, batch)
        return models[batch]

    def reply(asked: dict[str, int]) -> dict[str, Any]:
        if contender.kind == "gemm":
            return {"seconds": gemm_seconds(contender)}
        assert images is not None
        if "answers" in asked:
            batch = asked["answers"]
            whole = len(images) // batch * batch
            found = [model(batch)(np.ascontiguousarray(images[at : at + batch])).argmax(1) for at in range(0, whole, batch)]
            return {"answers": np.concatenate(found).tolist()}
        batch = asked["time"]
        some = np.ascontiguousarray(images[np.arange(batch) % len(images)])
        model(batch)(some)  # brings its weights near
        start = time.perf_counter()
        model(batch)(some)
        return {"seconds": time.perf_counter() - start}

    for line in sys.stdin:
        try:
            found = reply(json.loads(line))
        except Exception as error:  # whatever a backend raises is the answer's fault
            lines = str(error).strip().splitlines() or [type(error).__name__]
            found = {"fault": lines[0]}
        print(json.dumps(found), file=replies, flush=True)


if __name__ == "__main__":
    serve()
