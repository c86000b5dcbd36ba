"""``python -m benchmarks.gpu.engines``: slim against dense on an NVIDIA GPU in PyTorch, ONNX Runtime and TensorRT, offline.

    python -m benchmarks.gpu.engines --data cifar10-test.tar --train-data cifar10-train.tar --output engines.json
    python -m benchmarks.gpu.engines --tiny --output tiny.json    # on a CPU, in a minute: does it run?

The default plan at ``--budget``, found on ``--train-data``: PyTorch in fp16 and bf16, then ONNX Runtime's CUDA provider and
TensorRT or TensorRT-RTX where they are installed, with the parity of each engine. What is not installed gets the reason in
place of times. Results are written as they are made, and the same command goes on from there. **Not executed on a GPU yet**:
only the tiny run on a CPU has been.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Self

from benchmarks.accuracy.rows import BLOCKS, DEFAULT
from benchmarks.gpu.subject import GpuSubject
from patchslim.cli import run_command
from patchslim.errors import InputRejected, UsageError
from patchslim.records import atomic_path


@dataclasses.dataclass(frozen=True)
class EnginesOptions(GpuSubject):
    """Options of ``benchmarks.gpu.engines``."""

    eval_images: int | None = 1000
    """How many held-out images parity is measured on; None is all."""
    budgets: tuple[float, ...] = (0.45,)
    """Fraction of the dense multiply-accumulates that we remove: the first is timed."""
    batches: tuple[int, ...] = (1, 8, 32, 128)
    """Images per timed run."""
    rounds: int = 30
    """How often dense and slim are timed in turn."""
    output: Path = Path("engines.json")
    """The JSON file of results; exported models and engines are kept in OUTPUT-work beside it."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        if not self.batches or min(self.rounds, *self.batches) < 1:
            raise UsageError("--rounds and --batches: at least 1")
        self.of_tables().check()

    def smallest(self) -> Self:
        """What ``--tiny`` stands for."""
        return dataclasses.replace(super().smallest(), data=DEFAULT.data, train_data=DEFAULT.data, batches=(1, 2), rounds=2)

    def command(self) -> str:
        """The command line that these options come from."""
        return self.command_of("benchmarks.gpu.engines", ("threads",))


def measure_engines(options: EnginesOptions) -> dict[str, Any]:
    """Slim against dense in every engine, each written to ``--output`` as it is done. Raises ``PatchslimError``."""
    from benchmarks.accuracy.bench import Bench, CalibrationDraw
    from benchmarks.gpu import speed
    from benchmarks.gpu.device import device_of, ensure_device

    command = options.command()
    options = options.smallest() if options.tiny else options
    options.check()
    ensure_device(options.device)
    results = {"command": command, "device": device_of(options.device)} | found_results(options)
    bench = Bench(options.of_tables())
    draw = CalibrationDraw(bench, bench.options.modes[0], 0)
    case = dataclasses.replace(bench.options.default_case(), method=f"{BLOCKS}auto", budget=options.budgets[0])
    found = draw.found(case)
    draw.close()
    results |= {"reduction": 1 - found.plan.macs() / found.plan.dense_macs(), "counts": found.plan.counts}
    subject = speed.Subject(bench, found, draw.module_of(found), bench.options.slimming(case), options.beside("work"))
    for part, measure in speed.MEASUREMENTS.items():
        if part not in results:
            bench.reporter.say(f"speed: {part}")
            results[part] = measure(subject, options.batches, options.rounds)
            with atomic_path(options.output) as path:
                path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def found_results(options: EnginesOptions) -> dict[str, Any]:
    """What an earlier call of the same command wrote; raises ``InputRejected`` where it was another, or on another device."""
    from benchmarks.gpu.device import device_of

    if not options.output.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(options.output.read_text(encoding="utf-8"))
        same = found["device"]["name"] == device_of(options.device)["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputRejected(f"{options.output}: not a results file of benchmarks.gpu.engines: {error}") from error
    if not same:
        raise InputRejected(f"{options.output}: holds results of {found['device']['name']}: take another --output")
    return found


def main(options: EnginesOptions) -> int:
    """Measure, and print the results as JSON."""
    print(json.dumps(measure_engines(options), indent=1))
    return 0


if __name__ == "__main__":
    description = "Slim against dense on an NVIDIA GPU: PyTorch, ONNX Runtime, TensorRT."
    sys.exit(run_command(EnginesOptions, main, prog="benchmarks.gpu.engines", description=description))
