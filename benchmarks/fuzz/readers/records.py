"""Readers of records: plans, latency tables, manifests, parity reports, facts; mutated as text, and drawn from their schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from pydantic import BaseModel

from benchmarks.fuzz import seeds
from benchmarks.fuzz.mutators import mutate_json
from benchmarks.fuzz.target import Files, Target
from patchslim.latency_table import LatencyTable
from patchslim.plan import SlimPlan
from validate.manifest import Manifest
from validate.parity_records import ParityReport


@cache
def _text(record: Callable[[], Any]) -> str:
    return str(record().model_dump_json())


def _plan(folder: Path) -> object:
    from patchslim.plan import load_plan

    return load_plan(folder / "plan.json")


def _latency_table(folder: Path) -> object:
    from patchslim.latency_table import load_table

    return load_table(folder / "latency_table.json")


def _manifest(folder: Path) -> object:
    from validate.bundle import load_manifest

    return load_manifest(folder)


def _parity(folder: Path) -> object:
    from validate.bundle import load_parity

    return load_parity(folder)


def _facts(folder: Path) -> object:
    """A fact of the work folder, which is found out again where it is damaged: there is nothing to refuse."""
    from export.cache import FactStore

    store = FactStore(folder)
    path = store.path("fact", [], number=1)
    (folder / "fact.json").replace(path)
    try:
        return store.recall("fact", lambda: 1, number=1)
    finally:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class RecordFile:
    """A file that is a record: its name, what it is, a valid one as JSON, and its reader."""

    file: str
    kind: type[BaseModel]
    text: Callable[[], str]
    read: Callable[[Path], object]

    def mutated(self, share: float) -> Target:
        """Its reader with text that was mutated."""
        return Target(self.file, share, self._valid, lambda rng: {self.file: mutate_json(rng, self.text())}, self.read)

    def drawn(self, share: float) -> Target:
        """Its reader with records that its schema allows: see ``strategies``."""
        return Target(f"{self.file} by its schema", share, self._valid, self._draw, self.read)

    def _valid(self) -> Files:
        return {self.file: self.text().encode()}

    def _draw(self, rng: Random) -> Files:
        return {self.file: _drawing(self)(rng).encode("utf-8", "surrogatepass")}


@cache
def _drawing(record: RecordFile) -> Callable[[Random], str]:
    from benchmarks.fuzz.strategies import drawn_records

    return drawn_records(record.kind, json.loads(record.text()))


@cache
def _of_two_engines(name: str) -> str:
    """A record of the seed's bundle, as if OpenVINO were in it too."""
    record = json.loads(seeds.bundle()[name])
    slim = next(rung for rung in record["rungs"] if rung["stage"] == "onnx-slim")
    record["rungs"].append(slim | {"stage": "engine-openvino", "compared_to": "onnx-slim"})
    second = record["engine"] | {"backend": "openvino", "status": slim["status"]}
    trial = {"precision": "fp32", "status": "passed", "ms": 2.0, "batch": 8, "top1_drop": 0.0, "chosen": True}
    first = {"name": "ort", "stage": "engine", "onnx": "model.onnx", "macs": record["macs"], "engine": record["engine"]}
    more = {
        "name": "openvino",
        "stage": "engine-openvino",
        "engine": second,
        "ms": 2.0,
        "batch": 8,
        "precision_trials": [trial],
    }
    return json.dumps(record | {"engines": [first, first | more | {"precision_trials": [trial]}]})


_RECORDS = (
    RecordFile("plan.json", SlimPlan, lambda: _text(seeds.plan), _plan),
    RecordFile("latency_table.json", LatencyTable, lambda: _text(seeds.latency_table), _latency_table),
    RecordFile("manifest.json", Manifest, lambda: _of_two_engines("manifest.json"), _manifest),
    RecordFile("parity.json", ParityReport, lambda: _of_two_engines("parity.json"), _parity),
)
_VALID_FACT = json.dumps({"value": {"digest": "0" * 64, "sizes": [1, 2, 3], "share": 0.5}})


def _fact(rng: Random) -> Files:
    return {"fact.json": mutate_json(rng, _VALID_FACT)}


TARGETS: tuple[Target, ...] = (
    *(record.mutated(share) for record, share in zip(_RECORDS, (140_000, 100_000, 110_000, 100_000), strict=True)),
    *(record.drawn(share) for record, share in zip(_RECORDS, (15_000, 10_000, 8_000, 10_000), strict=True)),
    Target("facts of the work folder", 50_000, lambda: {"fact.json": _VALID_FACT.encode()}, _fact, _facts),
)
