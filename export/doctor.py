"""``patchslim doctor``: what is installed, what works on this machine, and what to install for the rest. Needs no torch."""

from __future__ import annotations

if __name__ == "__main__":
    from patchslim.interrupts import end_when_interrupted

    end_when_interrupted()

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.engines.table import print_engines
from patchslim.cli import run_command
from patchslim.errors import EXIT_DONE

EXAMPLES = ("", "--json")
#: Flags of Linux's cpuinfo that decide how fast ONNX Runtime, OpenVINO and PyTorch are, and what people call them.
INSTRUCTION_SETS = {
    "avx": "AVX",
    "f16c": "F16C",
    "fma": "FMA",
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "amx_fp16": "AMX FP16",
    "asimd": "NEON",
    "asimdhp": "NEON FP16",
    "asimddp": "NEON dot product",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
    "sve2": "SVE2",
}
#: What a user should know before an extra is installed.
NOTES = {
    "trt": "from NVIDIA's own index; NVIDIA's licence applies",
    "rtx": "NVIDIA's licence applies",
}


@dataclass(frozen=True)
class DoctorOptions:
    """Say what is installed, what works on this machine, and what to install for the rest."""

    json: bool = False
    """Print one JSON object instead of tables."""


def examine() -> dict[str, Any]:
    """Everything that ``doctor`` knows, ready for JSON. Builds no engine, and imports none but ONNX Runtime."""
    from export.engines.support import engine_support
    from patchslim import cuda
    from patchslim.packages import DISTRIBUTION, PACKAGES, install_command, installed_version
    from patchslim.timing import processor_name

    versions = {package: package.version for package in PACKAGES}
    missing = {
        extra: [package.distribution for package in PACKAGES if extra in package.extras and versions[package] is None]
        for extra in sorted({extra for package in PACKAGES for extra in package.extras})
    }
    return {
        "patchslim": installed_version(DISTRIBUTION),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": {"name": processor_name(), "cores": os.cpu_count(), "instruction_sets": instruction_sets()},
        "gpu": {"target": cuda.local_target(), "name": cuda.device_name(), "cuda_driver": cuda.driver_version()},
        "packages": [
            {"name": package.distribution, "version": found, "extras": list(package.extras)}
            for package, found in versions.items()
        ],
        "onnxruntime_providers": onnxruntime_providers(),
        "engines": [dataclasses.asdict(row) for row in engine_support()],
        "extras": {
            extra: {"missing": names, "install": install_command(extra) if names else None, "note": NOTES.get(extra)}
            for extra, names in missing.items()
        },
    }


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The processor's instruction sets that matter for inference; empty where the system does not tell."""
    from patchslim.device import cpu_flags

    flags = cpu_flags(cpuinfo)
    return [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]


def onnxruntime_providers() -> list[str]:
    """ONNX Runtime's execution providers, the preferred one first; empty where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def run(options: DoctorOptions) -> int:
    """Print what was found; returns exit code 0, whatever that is."""
    found = examine()
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print_report(found)
    return EXIT_DONE


def print_report(found: dict[str, Any]) -> None:
    """Print what ``examine`` returned as tables."""
    from rich.markup import escape
    from rich.table import Table

    from patchslim.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    machine = Table.grid(padding=(0, 2))
    processor, gpu = found["processor"], found["gpu"]
    driver = f"CUDA driver {gpu['cuda_driver']}" if gpu["cuda_driver"] else "no CUDA driver"
    for name, value in (
        ("patchslim", found["patchslim"] or "not installed: run from a checkout"),
        ("Python", f"{found['python']} on {found['platform']}"),
        ("processor", f"{processor['name']}, {processor['cores']} logical cores"),
        ("instruction sets", ", ".join(processor["instruction_sets"]) or "not known"),
        ("GPU", f"{gpu['name']} ({gpu['target']}), {driver}" if gpu["target"] else f"none visible, {driver}"),
        ("ONNX Runtime", ", ".join(found["onnxruntime_providers"]) or "not installed"),
    ):
        machine.add_row(name, escape(value))
    console.print(machine)

    packages = Table("package", "version", "extras", title="Packages", title_justify="left")
    for one in found["packages"]:
        packages.add_row(one["name"], one["version"] or "[yellow]missing[/]", ", ".join(one["extras"]))
    console.print(packages)

    print_engines(found["engines"], console)

    wanted = [told for told in found["extras"].values() if told["missing"]]
    if not wanted:
        console.print("\nEvery extra is installed.")
        return
    console.print("\nTo install what is missing:")
    for told in wanted:
        note = f"  ({told['note']})" if told["note"] else ""
        console.print(f"  {escape(told['install'])}: {_listed(told['missing'])}{note}")


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def main(prog: str = "python -m export.doctor") -> int:
    """The command line's entry point, called ``prog`` in its messages; returns the exit code."""
    return run_command(DoctorOptions, run, prog=prog, description=DoctorOptions.__doc__ or "", examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
