"""``python -m benchmarks.gpu.sizes``: slim against dense in PyTorch on an NVIDIA GPU, by size of ViT, plan, batch and form.

    python -m benchmarks.gpu.sizes --minutes 4 --output sizes.json
    python -m benchmarks.gpu.sizes --tiny --output tiny.json    # on a CPU, in a minute: does it run?

Weights and images are random: only time is looked at. Plans remove ``--reduction`` of the MACs: tokens merged after every block
(ramp), merged in three blocks (few-block), or left out with the ramp's counts (lost); ToMe at the same MACs beside them. Every
row is one model in one form at one batch, all of a batch timed in turn; ratios are taken within each round. Matrix products of
8,192 give the card's own rate in the same run.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from patchslim.cli import run_command
from patchslim.errors import UsageError
from patchslim.records import atomic_path
from patchslim.timing import interleaved

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from patchslim.plan import SlimPlan

_GEMM = 8192
#: What is timed, by (variant, form).
Runs: TypeAlias = dict[tuple[str, str], Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class SizesOptions:
    """Options of ``benchmarks.gpu.sizes``."""

    models: tuple[str, ...] = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
    """timm models with a class token."""
    reduction: float = 0.45
    """Fraction of the dense multiply-accumulates that is removed."""
    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    """Images at once."""
    dtypes: tuple[Literal["fp16", "bf16", "fp32"], ...] = ("fp16", "bf16")
    """Precisions; the later ones at the largest batch alone."""
    rounds: int = 15
    """How often all forms of a batch are timed in turn."""
    minutes: float = 4.0
    """No new measurement is begun after this; what is left out is named."""
    compiled: bool = True
    """torch.compile as well, for the first model: dense, ramp and few-block at the largest batch."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where PyTorch runs."""
    output: Path = Path("sizes.json")
    """The JSON file of results."""
    tiny: bool = False
    """A small model and the CPU instead: a test of the command, no measurement."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if not self.models or not self.batches or min(self.rounds, *self.batches) < 1 or not 0 <= self.reduction < 1:
            raise UsageError("--models, --batches and --rounds need at least 1, --reduction a fraction from 0 to below 1")


class Timer:
    """Times forms of models in turn, and keeps the rows."""

    def __init__(self, options: SizesOptions, device: torch.device) -> None:
        self.options, self.device, self.start = options, device, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    @property
    def late(self) -> bool:
        """Whether the minutes are over."""
        return time.monotonic() - self.start > 60 * self.options.minutes

    def clocked(self, run: Callable[[], object]) -> Callable[[], float]:
        """What gives the seconds of one run."""
        from benchmarks.gpu.speed import cpu_seconds, gpu_seconds

        return gpu_seconds(run) if self.device.type == "cuda" else cpu_seconds(run)

    def compare(
        self, runs: dict[tuple[str, str], Callable[[], object]], facts: dict[str, Any], ratios: dict[str, float]
    ) -> None:
        """Time ``runs``, by (variant, form), in turn; the ratio of each is to the dense one of its form."""
        clocked = [self.clocked(run) for run in runs.values()]
        seconds: NDArray[np.float64] = np.array(interleaved(clocked, self.options.rounds, warmup=3))
        names = list(runs)
        for place, (variant, form) in enumerate(names):
            if ("dense", form) not in runs:
                continue
            dense = names.index(("dense", form))
            low, speedup, high = np.percentile(seconds[:, dense] / seconds[:, place], [10, 50, 90])
            self.rows.append(
                {
                    **facts,
                    "variant": variant,
                    "form": form,
                    "ms": float(1e3 * np.median(seconds[:, place])),
                    "speedup": float(speedup),
                    "speedup_p10": float(low),
                    "speedup_p90": float(high),
                    "macs_ratio": ratios[variant],
                    "share_of_macs_ratio": float(speedup) / ratios[variant],
                }
            )


def measure_sizes(options: SizesOptions) -> dict[str, Any]:
    """Time every model. Raises ``PatchslimError``."""
    import torch

    from benchmarks.gpu.device import device_of, ensure_device

    if options.tiny:
        options = dataclasses.replace(
            options,
            models=("vit_tiny_patch16_224",),
            batches=(1, 2),
            dtypes=("fp32", "bf16"),
            rounds=2,
            compiled=False,
            device="cpu",
        )
    options.check()
    ensure_device(options.device)
    timer = Timer(options, torch.device(options.device))
    result: dict[str, Any] = {"reduction": options.reduction, "device": device_of(options.device), "gemm": gemm_rates(timer)}

    def write() -> dict[str, Any]:
        whole = result | {"rows": timer.rows, "left_out": timer.left_out}
        with atomic_path(options.output) as path:
            path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        return whole

    for name in options.models:
        variants, ratios = variants_of(name, options)
        for dtype in options.dtypes:
            for batch in options.batches if dtype == options.dtypes[0] else options.batches[-1:]:
                facts = {"model": name, "dtype": dtype, "batch": batch}
                if timer.late:
                    timer.left_out.append(f"{name} {dtype} {batch}")
                    continue
                compare_forms(timer, variants, facts, ratios)
                print(name, dtype, batch, f"{time.monotonic() - timer.start:.0f} s", file=sys.stderr, flush=True)
                write()
    if options.compiled:
        variants, ratios = variants_of(options.models[0], options)
        compare_compiled(timer, variants, {"model": options.models[0]}, ratios)
    return write()


def compare_forms(timer: Timer, variants: dict[str, nn.Module], facts: dict[str, Any], ratios: dict[str, float]) -> None:
    """Eager, and on a GPU as CUDA graphs."""
    import torch

    from benchmarks.gpu.speed import captured, eager

    dtype = dtype_of(facts["dtype"])
    images = torch.randn(facts["batch"], 3, *image_size(variants["dense"]), device=timer.device, dtype=dtype)
    runs: Runs = {}
    for variant, module in variants.items():
        there = copy.deepcopy(module).to(timer.device, dtype).eval()
        runs[variant, "eager"] = eager(there, images)
        if timer.device.type == "cuda":
            try:
                runs[variant, "cuda graph"] = captured(there, images)
            except RuntimeError as error:
                timer.left_out.append(f"{facts} {variant} cuda graph: {str(error).splitlines()[0]}")
    timer.compare(runs, facts, ratios)


def compare_compiled(timer: Timer, variants: dict[str, nn.Module], facts: dict[str, Any], ratios: dict[str, float]) -> None:
    """torch.compile with CUDA graphs, at the first precision and the largest batch."""
    import torch

    from benchmarks.gpu.speed import eager

    batch, name = timer.options.batches[-1], timer.options.dtypes[0]
    images = torch.randn(batch, 3, *image_size(variants["dense"]), device=timer.device, dtype=dtype_of(name))
    runs: Runs = {}
    for variant in ("dense", "ramp", "few-block"):
        if timer.late:
            timer.left_out.append(f"{facts} {variant} compiled")
            continue
        there = copy.deepcopy(variants[variant]).to(timer.device, dtype_of(name)).eval()
        try:
            compiled: Any = torch.compile(there, mode="reduce-overhead", dynamic=False)
            run = eager(compiled, images)
            for _ in range(3):
                run()
            runs[variant, "compiled"] = run
        except Exception as error:  # a compiler may fail in any way: the row says how
            timer.left_out.append(f"{facts} {variant} compiled: {type(error).__name__}: {str(error).splitlines()[0]}")
        print("compiled", variant, f"{time.monotonic() - timer.start:.0f} s", file=sys.stderr, flush=True)
    if ("dense", "compiled") in runs:
        timer.compare(runs, {**facts, "dtype": name, "batch": batch}, ratios)


def variants_of(name: str, options: SizesOptions) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The dense model and what is compared with it, and by how much each one's MACs are fewer."""
    import timm
    import torch

    from benchmarks.accuracy.baselines import tome_for_macs
    from benchmarks.gpu.few_blocks import few_block_counts, ramp_counts
    from slimming.models.slim_vit import SlimViT

    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=1000).eval()
    plans = {
        "ramp": plan_of_counts(model, name, ramp_counts(model, name, options.reduction), merges=True),
        "few-block": plan_of_counts(model, name, few_block_counts(model, name, options.reduction), merges=True),
        "lost": plan_of_counts(model, name, ramp_counts(model, name, options.reduction), merges=False),
    }
    dense = plans["ramp"].dense_macs()
    variants: dict[str, nn.Module] = {"dense": model}
    variants |= {variant: SlimViT(model, plan) for variant, plan in plans.items()}
    tome = tome_for_macs(model, int((1 - options.reduction) * dense), head_only=True)
    variants["ToMe"] = tome
    ratios = {"dense": 1.0, "ToMe": dense / tome.macs()} | {name: dense / plan.macs() for name, plan in plans.items()}
    return variants, ratios


def plan_of_counts(model: Any, name: str, counts: list[int], *, merges: bool) -> SlimPlan:
    """A plan of these token counts: evenly spread tokens are kept, and a dropped one goes into the kept one before it."""
    from slimming.api import make_plan

    tokens = int(model.pos_embed.shape[1])
    merged_into, present, kept = [-1] * tokens, list(range(tokens)), []
    for count in counts:
        last = count == 1
        block = [0] if last else [present[round(place * (len(present) - 1) / (count - 1))] for place in range(count)]
        if merges and not last:
            there = set(block)
            for place, token in enumerate(present):
                if token not in there:
                    before = [other for other in present[:place] if other in there and other > 0]
                    merged_into[token] = before[-1] if before else block[1]
        kept.append(block)
        present = block
    return make_plan(model, name, kept, merged_into=merged_into if merges else None)


def gemm_rates(timer: Timer) -> dict[str, float]:
    """TFLOP/s of square matrix products, by precision: what this device can do at best."""
    import torch

    found: dict[str, float] = {}
    side = _GEMM if timer.device.type == "cuda" else 512
    for name in timer.options.dtypes:
        left, right = (torch.randn(side, side, device=timer.device, dtype=dtype_of(name)) for _ in range(2))

        def run(left: Tensor = left, right: Tensor = right) -> object:
            return left @ right

        seconds = [timer.clocked(run)() for _ in range(5)]
        found[name] = 2 * side**3 / min(seconds[1:]) / 1e12
    return found


def dtype_of(name: str) -> torch.dtype:
    """PyTorch's name of a precision."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def image_size(model: Any) -> tuple[int, int]:
    """Height and width of a timm model's images."""
    height, width = model.patch_embed.img_size
    return int(height), int(width)


def main(options: SizesOptions) -> int:
    """Measure, and print a line per row."""
    result = measure_sizes(options)
    print("GEMM TFLOP/s", result["gemm"])
    for row in result["rows"]:
        print(
            f"{row['model']:24} {row['dtype']} {row['batch']:4} {row['form']:10} {row['variant']:10} {row['ms']:9.3f} ms "
            f"{row['speedup']:5.2f} of {row['macs_ratio']:.2f} ({row['share_of_macs_ratio']:.0%})"
        )
    print("left out:", *result["left_out"], sep="\n  ")
    return 0


if __name__ == "__main__":
    description = "Slim against dense in PyTorch on an NVIDIA GPU, by size, plan, batch and form."
    sys.exit(run_command(SizesOptions, main, prog="benchmarks.gpu.sizes", description=description))
