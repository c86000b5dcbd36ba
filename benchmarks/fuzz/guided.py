"""``python -m benchmarks.fuzz.guided``: inputs that atheris (libFuzzer) grows towards lines that none has reached yet.

    uv run --with atheris python -m benchmarks.fuzz.guided --inputs 50000

For readers of one file that are written in Python: libFuzzer mutates that file's bytes and keeps those that reach new branches
of ours. It knows no format, so it complements ``benchmarks.fuzz``. It is no dependency of the project, since its wheels are for
a few versions of Python on Linux. Each reader has a process of its own. Bad outcomes are those of ``benchmarks.fuzz``; the
inputs are kept in OUTPUT.bad, for its ``--replay``, and the exit code is 5.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

#: The readers, by name, and the file that is mutated.
READERS = {
    "plan.json": "plan.json",
    "latency_table.json": "latency_table.json",
    "manifest.json": "manifest.json",
    "parity.json": "parity.json",
    "facts of the work folder": "fact.json",
    "golden.npz: archive": "golden.npz",
    "ONNX: external data": "model.onnx",
    "weights: config.json": "config.json",
    "tar headers": "train-0.tar",
    "WebDataset _info.json": "_info.json",
    "engine headers": "model.engine",
}
_ROOMS = ("patchslim", "validate", "graph_passes", "slimming", "export")
_ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class GuidedOptions:
    """Options of ``benchmarks.fuzz.guided``."""

    inputs: int = 50_000
    """How many inputs, for each reader."""
    seed: int = 1
    """What libFuzzer draws from; at least 1."""
    only: tuple[str, ...] = ()
    """These readers only, by name."""
    output: Path = Path("benchmarks/fuzz/guided.json")
    """The table as JSON."""


def run(options: GuidedOptions) -> int:
    """Give every reader its inputs and print the table; 5 where an outcome was bad."""
    from importlib.metadata import PackageNotFoundError, version

    from benchmarks.fuzz.cases import BAD, KINDS
    from patchslim.errors import EXIT_DONE, EXIT_PARITY, Unavailable, UsageError
    from patchslim.records import atomic_path

    names = options.only or tuple(READERS)
    if options.inputs < 1 or options.seed < 1 or (unknown := [name for name in names if name not in READERS]):
        fault = f"--only {unknown[0]}: not one of {', '.join(READERS)}" if options.inputs > 0 < options.seed else ""
        raise UsageError(fault or "--inputs and --seed must be positive")
    try:
        installed = version("atheris")
    except PackageNotFoundError as error:
        raise Unavailable(
            "atheris is not installed; run this as uv run --with atheris python -m benchmarks.fuzz.guided"
        ) from error
    rows = [_reader_row(name, options) for name in names]
    total: dict[str, int] = {key: sum(row[key] for row in rows) for key in ("inputs", *KINDS, "kept")}
    table = {
        "command": f"python -m benchmarks.fuzz.guided --inputs {options.inputs} --seed {options.seed}",
        "python": sys.version.split()[0],
        "atheris": installed,
        "total": total,
        "readers": rows,
    }
    with atomic_path(options.output) as part:
        part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for row in [*rows, {"reader": "all", **total}]:
        print(f"{row['reader']:<26}" + "".join(f"{row[key]:>10,}" for key in ("inputs", *KINDS, "kept")))
    return EXIT_PARITY if any(total[kind] for kind in BAD) else EXIT_DONE


def _reader_row(name: str, options: GuidedOptions) -> dict[str, Any]:
    """One reader in a process of its own, which ends by itself after the last input."""
    from benchmarks.fuzz.cases import KINDS
    from patchslim.errors import InputRejected

    with tempfile.TemporaryDirectory(prefix="patchslim-guided-") as folder:
        given = json.dumps([name, options.inputs, options.seed, folder, str(options.output.with_suffix(".bad").absolute())])
        command = [sys.executable, "-c", "import sys; from benchmarks.fuzz.guided import guide; guide(sys.argv[1])", given]
        path = os.pathsep.join(filter(None, [str(_ROOT), *sys.path]))
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        try:
            row: dict[str, Any] = json.loads((Path(folder) / "row").read_text())
        except (OSError, ValueError) as error:
            raise InputRejected(f"{name}: the process ended with {done.returncode}: {done.stderr[-2000:]}") from error
        row["kept"] = len(list((Path(folder) / "corpus").iterdir()))
    if row["inputs"] < options.inputs:  # libFuzzer ended it: a crash, a hang, or memory
        row["crash"] += 1
        row["inputs"] += 1
        row["errors"] = {**row.get("errors", {}), done.stderr[-600:]: 1}
    return {"reader": name, **{key: row.get(key, 0) for key in ("inputs", *KINDS, "kept")}} | (
        {"errors": row["errors"]} if row.get("errors") else {}
    )


def guide(given: str) -> None:
    """In a process of its own: have libFuzzer call the reader; never returns. ``given`` is what ``_reader_row`` gives."""
    import importlib

    atheris: Any = importlib.import_module("atheris")  # which may not be installed
    name, inputs, seed, place, bad = json.loads(given)
    with atheris.instrument_imports(include=list(_ROOMS)):
        from benchmarks.fuzz.cases import BAD, KINDS, outcome_of, targets_of, write

        target = targets_of("benchmarks.fuzz.targets")[name]
        folder = Path(place) / "case"
        write(folder, target.valid())
        target.read(folder)  # what it imports on the way is instrumented too
    valid, file, counts = target.valid(), READERS[name], Counter[str]()
    errors: Counter[str] = Counter()
    corpus = Path(place) / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(valid[file])

    def tell() -> None:
        row: dict[str, Any] = {"inputs": counts.total(), "errors": dict(errors.most_common(10))}
        row.update((kind, counts[kind]) for kind in KINDS)
        (Path(place) / "row").write_text(json.dumps(row))

    def one(data: bytes) -> None:
        files = valid | {file: data}
        write(folder, files)
        outcome = outcome_of(target, folder)
        counts[outcome.kind] += 1
        if outcome.kind in BAD:
            errors[outcome.error[:300]] += 1
            case = Path(bad) / f"{file}-{counts.total()}"
            write(case / "files", files)
            case_of = {"targets": "benchmarks.fuzz.targets", "target": name, "seed": seed, "index": counts.total()}
            (case / "case.json").write_text(json.dumps({**case_of, "kind": outcome.kind, "error": outcome.error}, indent=1))
        if counts.total() % 1000 == 0 or counts.total() == inputs:
            tell()
        if counts.total() == inputs:
            os._exit(0)

    tell()
    limits = ["-timeout=10", "-rss_limit_mb=3072", f"-max_len={max(4096, 4 * len(valid[file]))}"]
    atheris.Setup([name, str(corpus), f"-seed={seed}", f"-artifact_prefix={bad}-", *limits], one)
    atheris.Fuzz()


def main() -> int:
    """Run the command line."""
    from patchslim.cli import run_command

    return run_command(
        GuidedOptions, run, prog="python -m benchmarks.fuzz.guided", description=(__doc__ or "").split("\n\n")[0]
    )


if __name__ == "__main__":
    sys.exit(main())
