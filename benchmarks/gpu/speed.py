"""Slim against dense, side by side: PyTorch, then ONNX Runtime and TensorRT where this machine has them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.accuracy.latency_exports import export_options
from patchslim.errors import PatchslimError
from patchslim.timing import interleaved

if TYPE_CHECKING:
    from torch import Tensor, nn

    from benchmarks.accuracy.bench import Bench
    from slimming.api import FoundPlan
    from slimming.models.slim_vit import SlimViT
    from slimming.options import ModelOptions

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: Runs in one timing on a GPU: enough for its queue to fill, as it does in a server.
_GPU_REPEATS = 10
#: Held-out images on which the answers of a half-precision model are compared with those of the float32 one.
_COMPARED = 256
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is timed: a dense model, its plan, the slimmed model, and the options that they come from."""

    bench: Bench
    found: FoundPlan
    slim: SlimViT
    options: ModelOptions
    work: Path  # a folder for exported models and engines

    @property
    def macs_ratio(self) -> float:
        """The speed-up that the MACs promise."""
        return self.found.plan.dense_macs() / self.found.plan.macs()

    def images(self, count: int) -> Tensor:
        """The first ``count`` held-out images, from the start again where there are fewer."""
        return self.bench.pixels[[index % len(self.bench.pixels) for index in range(count)]]


def pytorch_speed(subject: Subject, batches: Sequence[int], rounds: int) -> Rows:
    """PyTorch in half precision: eager, and on a GPU also as a CUDA graph, which has no launch cost of its own."""
    rows: Rows = []
    device = next(subject.bench.model.parameters()).device
    for name, dtype in DTYPES.items():
        models = [copy.deepcopy(model).to(device, dtype).eval() for model in (subject.bench.model, subject.slim)]
        shares = {
            f"{kind}_same_answer": same_answers(subject, model, dtype)
            for kind, model in zip(("dense", "slim"), models, strict=True)
        }
        for batch in batches:
            images = subject.images(batch).to(device, dtype)
            forms = {"eager": eager, "cuda graph": captured} if device.type == "cuda" else {"eager": eager}
            for form, make in forms.items():
                row: dict[str, Any] = {"dtype": name, "form": form, "batch": batch}
                try:
                    runs = [make(model, images) for model in models]
                    clocked = [gpu_seconds(run) if device.type == "cuda" else cpu_seconds(run) for run in runs]
                    row |= compared(interleaved(clocked, rounds), subject.macs_ratio) | shares
                except RuntimeError as error:
                    row |= {"not_executed": str(error).partition("\n")[0]}
                rows.append(row)
    return rows


def onnxruntime_speed(subject: Subject, batches: Sequence[int], rounds: int) -> Rows | dict[str, str]:
    """The bundle's model against the dense export in ONNX Runtime, on the GPU where PyTorch is; ``validate`` times them."""
    from export import export_bundle
    from validate.latency import compare_latency

    on_gpu = next(subject.bench.model.parameters()).device.type == "cuda"
    provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
    try:
        outcome = export_bundle(export_options(subject.options, subject.found, subject.work / "onnxruntime", device="cpu"))
        return [
            compare_latency(
                outcome.dense_onnx,
                outcome.bundle / "model.onnx",
                subject.macs_ratio,
                batch=batch,
                threads=0 if on_gpu else 1,
                rounds=rounds,
                provider=provider,
            ).model_dump(mode="json")
            for batch in batches
        ]
    except PatchslimError as error:
        return {"not_executed": str(error)}


def tensorrt_speed(subject: Subject, batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Engines of the dense and the slim model, built by ``export_bundle`` for this GPU, and their parity reports."""
    from export import export_bundle
    from patchslim import cuda
    from patchslim.tensorrt_runner import TrtRunner

    target = cuda.local_target()
    if target is None:
        return {"not_executed": "no CUDA driver or no visible GPU on this machine"}
    runners: list[TrtRunner] = []
    try:
        options = export_options(subject.options, subject.found, subject.work / "tensorrt", engine="trt", target=(target,))
        dense_places: dict[str, Any] = {"output": subject.work / "tensorrt" / "dense-bundle", "plan": None, "dense": True}
        outcomes = [export_bundle(dataclasses.replace(options, **dense_places)), export_bundle(options)]
        runners = [TrtRunner(outcome.engine.files[0], outcome.engine.backend) for outcome in outcomes]
        found: dict[str, Any] = {"backend": outcomes[0].engine.backend, "version": outcomes[0].engine.version}
        found["parity"] = [
            [rung.model_dump(mode="json") for rung in outcome.parity.rungs if rung.stage == "engine"] for outcome in outcomes
        ]
        rows: Rows = []
        for batch in batches:
            try:
                runs = [runner.timed(subject.images(batch).numpy()) for runner in runners]
                rows.append({"batch": batch, **compared(interleaved(runs, rounds), subject.macs_ratio)})
            except PatchslimError as error:
                rows.append({"batch": batch, "not_executed": str(error)})
        return found | {"rows": rows}
    except PatchslimError as error:
        return {"not_executed": str(error)}
    finally:
        for runner in runners:
            runner.close()


#: In the order in which they are measured, by their name in the results.
MEASUREMENTS: dict[str, Callable[[Subject, Sequence[int], int], Rows | dict[str, Any]]] = {
    "pytorch": pytorch_speed,
    "onnxruntime": onnxruntime_speed,
    "tensorrt": tensorrt_speed,
}


def eager(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """What runs ``model`` on ``images`` as PyTorch does by itself."""

    def run() -> None:
        with torch.inference_mode():
            model(images)

    return run


def captured(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """What replays a CUDA graph of ``model`` on ``images``; see PyTorch's notes on CUDA graphs. Not executed yet."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():  # so that nothing is allocated or tuned while it is captured
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        model(images)
    return graph.replay


def gpu_seconds(run: Callable[[], object]) -> Callable[[], float]:
    """What runs a model several times and gives the GPU's seconds for one, between two CUDA events. Not executed yet."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def seconds() -> float:
        start.record()
        for _ in range(_GPU_REPEATS):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / _GPU_REPEATS

    return seconds


def cpu_seconds(run: Callable[[], object]) -> Callable[[], float]:
    """What runs a model once and gives the seconds that it took on the CPU."""
    from patchslim.timing import fair_clock, timed

    return timed(run, fair_clock(torch.get_num_threads()))


def compared(times: Sequence[Sequence[float]], macs_ratio: float) -> dict[str, float]:
    """Medians of (rounds, [dense, slim]) seconds, and of their ratios within each round with the 10th and 90th percentile."""
    seconds = np.array(times)
    low, speedup, high = (float(value) for value in np.percentile(seconds[:, 0] / seconds[:, 1], [10, 50, 90]))
    dense, slim = (float(value) for value in 1e3 * np.median(seconds, axis=0))
    ratios = {"speedup": speedup, "speedup_p10": low, "speedup_p90": high}
    return {"dense_ms": dense, "slim_ms": slim, **ratios, "macs_ratio": macs_ratio, "efficiency": speedup / macs_ratio}


def same_answers(subject: Subject, model: nn.Module, dtype: torch.dtype) -> float:
    """Share of held-out images whose top-1 in ``dtype`` is that of the same model in float32."""
    reference = subject.bench.model if type(model) is type(subject.bench.model) else subject.slim
    device = next(model.parameters()).device
    images = subject.bench.pixels[:_COMPARED].to(device)
    with torch.inference_mode():
        return float((model(images.to(dtype)).argmax(1) == reference(images).argmax(1)).double().mean())
