"""Time and peak memory of all passes, from a dense ONNX file to a slim one, for ViTs of several sizes.

    python -m benchmarks.passes --output benchmarks/results/passes.json

Models have random weights, are exported by torch.onnx.export from timm's VisionTransformer, and get a random nested plan. Every
measurement is a process of its own with one thread; those of one size run one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from patchslim.plan import SlimPlan

_T = TypeVar("_T")


@dataclass(frozen=True)
class Size:
    """A ViT with a class token, by its widths. ``mlp`` is the hidden layer's width."""

    name: str
    width: int
    depth: int
    heads: int
    mlp: int
    patch: int = 16
    image: int = 224
    classes: int = 1000


SIZES = {
    "test": Size("a ViT for tests", 32, 2, 2, 64, patch=8, image=32, classes=10),
    "Ti": Size("ViT-Ti/16", 192, 12, 3, 768),
    "S": Size("ViT-S/16", 384, 12, 6, 1536),
    "B": Size("ViT-B/16", 768, 12, 12, 3072),
    "L": Size("ViT-L/16", 1024, 24, 16, 4096),
    "g": Size("22 blocks of ViT-g/14", 1408, 22, 16, 6144, patch=14),
}


def export(size: Size, path: Path) -> None:
    """Export the dense model, opset 20, dynamic batch; above 2 GB its weights go to a file beside it."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=size.image,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        mlp_ratio=size.mlp / size.width,
        num_classes=size.classes,
    ).eval()
    for block in model.blocks:
        block.attn.fused_attn = False  # of this model alone: timm's own switch is of the whole process
    program = torch.onnx.export(
        model,
        (torch.randn(2, 3, size.image, size.image),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=4 * sum(parameter.numel() for parameter in model.parameters()) > 1.9e9)


def random_plan(size: Size, share: float, seed: int = 0) -> SlimPlan:
    """A nested plan of random tokens with about ``share`` of the dense MACs; the last block keeps the class token alone."""
    from patchslim.macs import Geometry, macs_of
    from patchslim.plan import Origin, SlimPlan

    side = size.image // size.patch
    tokens = side * side + 1
    geometry = Geometry(
        embed_dim=size.width,
        mlp_hidden_dim=size.mlp,
        patch_macs=side * side * 3 * size.patch**2 * size.width,
        head_macs=size.width * size.classes,
    )

    def counts(last: float) -> list[int]:
        steps = [1 - (1 - last) * (block + 1) / size.depth for block in range(size.depth - 1)]
        return [*(max(2, round(tokens * step)) for step in steps), 1]

    wanted = share * macs_of([tokens] * size.depth, tokens, geometry)
    linear = min(
        (counts(percent / 100) for percent in range(-100, 101)), key=lambda c: abs(macs_of(c, tokens, geometry) - wanted)
    )
    rng, patches, kept = random.Random(seed), list(range(1, tokens)), []
    for count in linear:
        patches = sorted(rng.sample(patches, min(count - 1, len(patches))))
        kept.append([0, *patches])
    return SlimPlan(
        model=size.name, tokens=tokens, grid=(side, side), prefix_tokens=1, pooling="token", head_tokens=[0], mode="compact",
        kept=kept, geometry=geometry, origin=Origin(score="none", criterion="manual", value=0.0),
    )  # fmt: skip


class MemoryWatch:
    """The most private memory (RssAnon) that this process has while the watch is entered, sampled every 5 ms; in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, memory("RssAnon"))


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure_passes(dense: Path, plan_file: Path, slim_file: Path) -> dict[str, Any]:
    """Load, run all default passes and save, in this process, which has done nothing else."""
    from graph_passes import Settings, default_passes, load_model, run_passes, save_model, slim
    from patchslim.plan import load_plan

    plan = load_plan(plan_file)
    before = memory("RssAnon")
    stages: dict[str, dict[str, float]] = {}

    def timed(name: str, work: Callable[[], _T]) -> _T:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        stages[name] = {
            "wall_s": round(time.perf_counter() - wall, 3),
            "cpu_s": round(time.process_time() - cpu, 3),
        }
        return result

    with MemoryWatch() as watch:
        model = timed("load", lambda: load_model(dense))
        result = timed("passes", lambda: slim(model, plan))
        timed("save", lambda: save_model(result.model, slim_file))
    peaks = {"peak_resident_bytes": memory("VmHWM"), "peak_private_bytes": watch.peak, "private_before_bytes": before}
    nodes = {"dense": len(model.graph.node), "slim": len(result.model.graph.node)}
    total = {key: round(sum(stage[key] for stage in stages.values()), 3) for key in ("wall_s", "cpu_s")}
    steps, current = {}, model
    for entry in default_passes("split", "fp32"):
        cpu = time.process_time()
        current = run_passes(current, [entry], Settings(plan)).model
        steps[entry] = round(time.process_time() - cpu, 3)
    return {"total": total, "stages": stages, **peaks, "nodes": nodes, "each_pass_alone_cpu_s": steps}


def bytes_of(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def run_alone(*arguments: object) -> str:
    """Run this module in a process of one thread and return what it prints; raises ``SystemExit`` where it fails."""
    command = [sys.executable, "-m", "benchmarks.passes", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"benchmarks.passes: {' '.join(map(str, arguments))}: exit {done.returncode}")
    return done.stdout


def row(key: str, work: Path, share: float, rounds: int) -> dict[str, Any]:
    """Everything about one size; ``work / key`` keeps its export."""
    size, folder = SIZES[key], work / key
    dense, plan_file = folder / "dense" / "dense.onnx", folder / "plan.json"
    if not dense.exists():
        dense.parent.mkdir(parents=True, exist_ok=True)
        run_alone("--export", key, dense)
    plan = random_plan(size, share)
    plan.save(plan_file)
    measured = []
    for _ in range(rounds):
        slim = folder / "slim" / "slim.onnx"
        measured.append(json.loads(run_alone("--measure", dense, plan_file, slim)))
        slim_bytes = bytes_of(slim.parent)
        shutil.rmtree(slim.parent)
    model_bytes = bytes_of(dense.parent)
    return {
        "size": key,
        "name": size.name,
        "macs_share": round(plan.macs() / plan.dense_macs(), 4),
        "model_bytes": model_bytes,
        "slim_bytes": slim_bytes,
        "cpu_s": min(entry["total"]["cpu_s"] for entry in measured),
        "wall_s": min(entry["total"]["wall_s"] for entry in measured),
        "resident_over_model": round(max(entry["peak_resident_bytes"] for entry in measured) / model_bytes, 3),
        "private_over_model": round(max(entry["peak_private_bytes"] for entry in measured) / model_bytes, 3),
        "rounds": measured,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| model | MB | nodes, dense and slim | CPU s | peak resident memory / model | peak private memory / model |",
        "|---|---|---|---|---|---|",
    ]
    for entry in rows:
        nodes = entry["rounds"][0]["nodes"]
        lines.append(
            f"| {entry['name']} | {entry['model_bytes'] / 1e6:.0f} | {nodes['dense']}, {nodes['slim']} | {entry['cpu_s']:.1f} "
            f"| {entry['resident_over_model']:.2f} | {entry['private_over_model']:.2f} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, str | int]:
    """What the numbers depend on."""
    from patchslim.timing import processor_name

    packages = {package: version(package) for package in ("onnx", "onnx-graphsurgeon", "numpy", "torch", "timm")}
    return {"cpu": processor_name(), "threads": 1, "python": platform.python_version(), **packages}


def main() -> int:
    """The command line's entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["Ti", "S", "B", "L", "g"], help="default: %(default)s")
    parser.add_argument("--macs", type=float, default=0.45, help="the plan's share of the dense MACs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="times that each is measured (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="a folder that keeps the exports (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--export", nargs=2, metavar=("SIZE", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, metavar=("DENSE", "PLAN", "SLIM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.export:
        with contextlib.redirect_stdout(sys.stderr):
            export(SIZES[args.export[0]], Path(args.export[1]))
        return 0
    if args.measure:
        with contextlib.redirect_stdout(sys.stderr):
            measured = measure_passes(*map(Path, args.measure))
        print(json.dumps(measured))
        return 0
    rows = []
    for key in args.sizes:
        with contextlib.nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as work:
            rows.append(row(key, Path(work), args.macs, args.rounds))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    if args.output:
        options = f"--sizes {' '.join(args.sizes)} --macs {args.macs} --rounds {args.rounds}"
        results = {
            "command": f"python -m benchmarks.passes {options} --output {args.output}",
            "machine": machine(),
            "rows": rows,
        }
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
