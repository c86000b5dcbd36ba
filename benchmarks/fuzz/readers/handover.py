"""Readers of what a bundle hands over beside its models and reports, and of what a device sends back.

Build recipes, times, bills of materials, digests for ``sha256sum``, signatures, records of a build, attestations.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import seeds
from benchmarks.fuzz.bundles import CLASSES, IMAGES
from benchmarks.fuzz.mutators import mutate_bytes, mutate_json
from benchmarks.fuzz.readers.records import RecordFile
from benchmarks.fuzz.target import Files, Target
from patchslim.device import Device
from patchslim.errors import InputRejected
from patchslim.ort_runner import CPU
from patchslim.records import load_record
from validate.attestation import Attestation, DeviceImages, check_attestation
from validate.build_recipe import BuildRecipe, read_recipe
from validate.built_engine import BuildRecord, read_build
from validate.bundle import GOLDEN, LATENCY, MANIFEST, SBOM, SUMS, expected_sums, load_manifest, sums_fault
from validate.engine_runs import EngineRun, GoldenParity, LatencyPoint
from validate.latency import LatencyReport
from validate.latency_sheet import LatencySheet
from validate.manifest import FileRecord, Manifest
from validate.parity_records import EngineRecord
from validate.record_checks import check_sbom
from validate.verdict import BundleVerdict, Check

_SIGNED = Path(__file__).parents[1] / "signed"  # a folder with a signature, and the public key that it is checked with
_DEVICE = Device(platform="Linux", machine="x86_64", processor="a CPU", cores=2, python="3.11", gpu=None)


def _manifest() -> Manifest:
    return Manifest.model_validate_json(seeds.bundle()[MANIFEST])


def _recipe() -> str:
    return seeds.bundle()["recipe.json"].decode()


@cache
def _sheet() -> str:
    """Times at two batch sizes."""
    times: dict[str, Any] = {"dense_ms": 2.0, "slim_ms": 1.0, "speedup": 2.0, "speedup_p10": 1.9, "speedup_p90": 2.1}
    judged: dict[str, Any] = {"macs_ratio": 2.0, "efficiency": 1.0, "meets_criterion": True}
    common: dict[str, Any] = {"dense": "dense.onnx", "slim": "model.onnx", "provider": CPU, "threads": 1, "rounds": 3}
    comparisons = [LatencyReport(batch=batch, **common, **times, **judged) for batch in (1, 8)]
    sheet = LatencySheet(processor="a CPU", runtime="ONNX Runtime 1", comparisons=comparisons)
    return str(sheet.model_dump_json())


@cache
def _attestation() -> str:
    """What a device says of the bundle's models in ONNX Runtime, with images of its own."""
    manifest = _manifest()
    digests = {file.path: file.sha256 for file in manifest.files}
    rung = manifest.rungs[0]
    runs = []
    for record in manifest.onnx:
        limits = {"tolerance": record.max_error, "min_agreement": record.min_agreement}
        golden = GoldenParity.model_validate(
            {"images": IMAGES, "non_finite": 0, "max_error": 1e-6, "agreement": 100.0, **limits}
        )
        times = LatencyPoint(batch=1, runs=200, p50_ms=1.0, p90_ms=1.5, p99_ms=2.0, images_per_second=900.0, clock="wall")
        ran: dict[str, Any] = {"golden": golden, "accuracy": rung, "latency": [times], "status": "passed", "threads": 1}
        runs.append(EngineRun(engine="ort", version="1", on=CPU, file=record.path, sha256=digests[record.path], **ran))
    checks = [Check(name="manifest", subject=MANIFEST, status="passed", detail="schema 1")]
    said = Attestation(
        folder="bundle",
        manifest_sha256=hashlib.sha256(seeds.bundle()[MANIFEST]).hexdigest(),
        checks=checks,
        manifest=manifest,
        max_top1_drop=0.2,
        gate_rule="point",
        engines=runs,
        measured=[rung],
        images=DeviceImages(folder="images", images=IMAGES, classes=CLASSES),
        unchecked=[],
        passed=True,
        exit_code=0,
        device=_DEVICE,
        versions={"onnxruntime": "1"},
    )
    return str(said.model_dump_json())


def _read_attestation(folder: Path) -> object:
    """An attestation, held against the bundle that it is of."""
    digest = hashlib.sha256(seeds.bundle()[MANIFEST]).hexdigest()
    verdict = BundleVerdict(folder="bundle", checks=[], manifest=_manifest(), manifest_sha256=digest)
    with _beside(folder / GOLDEN, seeds.bundle()[GOLDEN]):
        checks = check_attestation(folder / "attestation.json", folder, verdict)
    for check in checks:
        if check.status == "failed":
            raise InputRejected(check.detail)
    return checks


@contextlib.contextmanager
def _beside(path: Path, data: bytes) -> Iterator[None]:
    """A file that the input needs beside it, for as long as it is read."""
    path.write_bytes(data)
    try:
        yield
    finally:
        path.unlink()


@cache
def _sbom() -> str:
    """A bill of materials with the one tool that the manifest names."""
    tools = [{"type": "library", "name": name, "version": version} for name, version in _manifest().tools.items()]
    return json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": tools})


def _read_sbom(folder: Path) -> object:
    """The bill of materials in a bundle that lists it as it is."""
    data = (folder / SBOM).read_bytes()
    record = FileRecord(path=SBOM, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    checks = list(check_sbom(folder, _manifest().model_copy(update={"files": [record]})))
    for check in checks:
        if check.status == "failed":
            raise InputRejected(check.detail)
    return checks


@cache
def _sums() -> Files:
    data = seeds.bundle()[MANIFEST]
    with tempfile.TemporaryDirectory() as folder, _beside(Path(folder) / MANIFEST, data):
        return {MANIFEST: data, SUMS: expected_sums(Path(folder), _manifest())}


def _mutated_sums(rng: Random) -> Files:
    return _sums() | {SUMS: mutate_bytes(rng, _sums()[SUMS])}


def _read_sums(folder: Path) -> object:
    if fault := sums_fault(folder, load_manifest(folder)):
        raise InputRejected(fault)
    return None


@cache
def _signed() -> Files:
    return seeds.files_of(_SIGNED)


def _mutated_signature(rng: Random) -> Files:
    """The signature, the key or what was signed with faults."""
    name = rng.choice(("folder/model.sig", "folder/model.sig", "folder/model.sig", "key.pem", "folder/model.txt"))
    data = _signed()[name]
    changed = mutate_json(rng, data.decode()) if name.endswith(".sig") and rng.random() < 0.8 else mutate_bytes(rng, data)
    return _signed() | {name: changed}


def _verify(folder: Path) -> object:
    from patchslim.signatures import verify_folder

    verify_folder(folder / "folder", folder / "key.pem")
    return None


_ENGINE = b"vtrt" + bytes(4) + (2).to_bytes(8, "little") + (64).to_bytes(8, "little") + bytes(40)


@cache
def _build() -> str:
    """The record of an engine that TensorRT-RTX built."""
    name = "model.sm89.engine"
    record = BuildRecord(
        recipe_sha256=hashlib.sha256(seeds.bundle()["recipe.json"]).hexdigest(),
        onnx_sha256="0" * 64,
        engine=EngineRecord(
            backend="tensorrt_rtx",
            version="1",
            targets=["sm89"],
            precision="fp32",
            fused_attentions=0,
            attentions=0,
            files=[name],
            status="not executed",
        ),
        tools={"tensorrt-rtx": "1"},
        device=_DEVICE,
        executed=False,
        reason="no GPU",
        kernels={"sm89": 3},
        files=[FileRecord(path=name, size=len(_ENGINE), sha256=hashlib.sha256(_ENGINE).hexdigest())],
    )
    return str(record.model_dump_json())


def _read_built(folder: Path) -> object:
    with _beside(folder / "model.sm89.engine", _ENGINE):
        return read_build(folder)


_RECORDS = (
    RecordFile("recipe.json", BuildRecipe, _recipe, lambda folder: read_recipe(folder / "recipe.json")),
    RecordFile("build.json", BuildRecord, _build, _read_built),
    RecordFile(LATENCY, LatencySheet, _sheet, lambda folder: load_record(folder / LATENCY, LatencySheet, "latency sheet")),
    RecordFile("attestation.json", Attestation, _attestation, _read_attestation),
)

TARGETS: tuple[Target, ...] = (
    *(record.mutated(share) for record, share in zip(_RECORDS, (25_000, 20_000, 20_000, 25_000), strict=True)),
    *(record.drawn(share) for record, share in zip(_RECORDS, (5_000, 5_000, 5_000, 5_000), strict=True)),
    Target(SBOM, 20_000, lambda: {SBOM: _sbom().encode()}, lambda rng: {SBOM: mutate_json(rng, _sbom())}, _read_sbom),
    Target(SUMS, 20_000, lambda: dict(_sums()), _mutated_sums, _read_sums),
    Target("signatures", 20_000, lambda: dict(_signed()), _mutated_signature, _verify),
)
