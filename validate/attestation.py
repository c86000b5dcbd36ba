"""The report that a device sends back: what was checked of a bundle, on what, and what came of it. And the sender's check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from patchslim.device import Device, device_versions, this_device
from patchslim.errors import EXIT_PARITY, InputRejected
from patchslim.records import StrictRecord, VersionOne, load_record
from validate.engine_runs import ON_ONNX, EngineRun
from validate.fields import GateRule
from validate.manifest import Manifest
from validate.parity_records import Rung
from validate.verdict import BundleVerdict, Check, failed

_Count = Annotated[int, Field(ge=0, le=1 << 31)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Text = Annotated[str, Field(max_length=4096)]


class DeviceImages(StrictRecord):
    """The labelled images of the device that accuracy was measured on."""

    folder: _Text
    images: _Count
    classes: _Count = Field(description="of the bundle's classes, those that have images there")


class Attestation(StrictRecord):
    """Everything that ``validate.run`` found, on which machine, and with which versions. It is not signed."""

    schema_version: VersionOne = 1
    folder: _Text = Field(description="where the bundle lay")
    manifest_sha256: _Sha256 | None = Field(description="of manifest.json's bytes, which name all others; null: unreadable")
    checks: list[Check]
    manifest: Manifest | None
    max_top1_drop: float | None = Field(description="the build's gate in points; null where it could not be read")
    gate_rule: GateRule
    engines: list[EngineRun] = Field(description="every model in every engine that it was run in")
    measured: list[Rung] = Field(description="accuracy on the device's images in the first of its engines")
    images: DeviceImages | None
    unchecked: list[str] = Field(description="what could not be looked at for want of a package")
    passed: bool
    exit_code: Annotated[int, Field(ge=0, le=5)]
    error: dict[str, str | int | None] | None = Field(default=None, description="what failed, as every command says it")
    device: Device
    versions: dict[str, str] = Field(description="of the packages that ran the models or read the images")

    @model_validator(mode="after")
    def _check(self) -> Attestation:
        verdict = self.verdict()
        if (self.exit_code, self.passed) != (verdict.exit_code, verdict.passed):
            raise ValueError(f"exit_code, passed: {self.exit_code} and {self.passed} are not what the checks say")
        if self.unchecked != verdict.unchecked:
            raise ValueError("unchecked: is not what the checks say")
        if self.passed and any(one.status == "failed" for one in self.engines):
            raise ValueError("passed: an engine failed")
        return self

    def verdict(self) -> BundleVerdict:
        """What the device found, as ``check_bundle`` gives it."""
        return BundleVerdict(
            folder=self.folder,
            checks=self.checks,
            manifest=self.manifest,
            manifest_sha256=self.manifest_sha256,
            engines=self.engines,
            max_top1_drop=self.max_top1_drop,
            gate_rule=self.gate_rule,
        )


def attest(verdict: BundleVerdict, measured: list[Rung], images: DeviceImages | None) -> Attestation:
    """A verdict as this machine attests it."""
    return Attestation(
        folder=verdict.folder[-4096:],
        manifest_sha256=verdict.manifest_sha256,
        checks=verdict.checks,
        manifest=verdict.manifest,
        max_top1_drop=verdict.max_top1_drop,
        gate_rule=verdict.gate_rule,
        engines=verdict.engines,
        measured=measured,
        images=images,
        unchecked=verdict.unchecked,
        passed=verdict.passed,
        exit_code=verdict.exit_code,
        device=this_device(),
        versions=device_versions(),
    )


def check_attestation(path: Path, bundle: Path, verdict: BundleVerdict) -> list[Check]:
    """Whether the attestation at ``path`` is of the ``bundle`` that ``verdict`` is about here, and whether it passed there.

    It is held against the bundle's own digests, tolerances and counts, so that it cannot be of another bundle, nor be easier
    on it. That the device did what it says is not proven by it.
    """
    name = path.name
    try:
        said = load_record(path, Attestation, "attestation")
        checks = [Check(name="attestation", subject=name, status="passed", detail=_introduced(said))]
        for fault in _foreign(said, bundle, verdict):
            raise InputRejected(f"{path}: {fault}")
    except InputRejected as error:
        return [failed("attestation", name, error)]
    ran = [one for one in said.engines if one.status == "passed"]
    if not said.passed:
        faults = "; ".join(check.detail for check in said.checks if check.status == "failed") or f"exit code {said.exit_code}"
        checks.append(failed("passed there", name, f"{path}: the device found: {faults}", EXIT_PARITY))
    elif not ran:
        checks.append(failed("passed there", name, f"{path}: no model was run in any engine there", EXIT_PARITY))
    else:
        detail = "; ".join(_engine_said(one) for one in ran)
        checks.append(Check(name="passed there", subject=name, status="passed", detail=detail))
    return checks


def _introduced(said: Attestation) -> str:
    device = said.device
    parts = [device.processor, f"{device.cores} cores", device.platform]
    if device.gpu is not None:
        parts.append(f"{device.gpu} ({device.compute_capability}), CUDA {device.cuda_driver}")
    return ", ".join(parts)


def _engine_said(one: EngineRun) -> str:
    said = f"{one.file} in {one.engine} {one.version} on {one.on}"
    if one.accuracy is not None and one.accuracy.top1 is not None:
        said += f", top-1 {one.accuracy.top1:.2f} % of {one.accuracy.images}"
    times = ", ".join(f"{point.p50_ms:.3g} ms at batch {point.batch}" for point in one.latency)
    return said + (f", {times}" if times else "")


def _foreign(said: Attestation, bundle: Path, verdict: BundleVerdict) -> list[str]:
    """What an attestation says that cannot be of this bundle."""
    manifest = verdict.manifest
    assert manifest is not None
    if said.manifest_sha256 != verdict.manifest_sha256:
        return [
            f"is of another bundle: its manifest.json has the SHA-256 {said.manifest_sha256}, not {verdict.manifest_sha256}"
        ]
    if said.manifest != manifest:
        return ["manifest: is not the one in the bundle"]
    from validate.record_checks import read_golden

    golden, faults = read_golden(bundle, manifest), []
    for one in said.engines:
        where = f"engines: {one.file} in {one.engine}"
        if one.recipe_sha256 is None:
            if one.sha256 not in [file.sha256 for file in manifest.files if file.path == one.file]:
                faults.append(f"{where}: no file of the bundle has its SHA-256")
        elif one.engine in ON_ONNX or one.recipe_sha256 != _recipe_digest(manifest):
            faults.append(f"{where}: was not built by the bundle's recipe")
        if one.golden is None or one.golden.images != len(golden.labels):
            faults.append(f"{where}: was not run on the {len(golden.labels)} golden inputs")
        elif (wanted := _wanted(one, manifest, golden)) != (one.golden.tolerance, one.golden.min_agreement):
            asked = f"{one.golden.tolerance:.3g} and {one.golden.min_agreement:g} %"
            faults.append(f"{where}: was held to {asked}, and the bundle asks for {wanted[0]:.3g} and {wanted[1]:g} %")
    return faults


def _recipe_digest(manifest: Manifest) -> str | None:
    from validate.build_recipe import RECIPE

    return next((file.sha256 for file in manifest.files if file.path == RECIPE), None)


def _wanted(one: EngineRun, manifest: Manifest, golden: Any) -> tuple[float, float]:
    """The error and the agreement that the bundle asks for of a run."""
    from validate.engine_checks import Expected

    record = next((record for record in manifest.onnx if record.path == one.file and record.max_error is not None), None)
    engines = manifest.engines_by_stage.values()
    precision = next((each.precision for each in engines if one.file in each.files), manifest.precision)
    expected = Expected.of_engine(precision, golden) if record is None else Expected.of_record(record)
    return expected.max_error, expected.min_agreement


def attestation_schema() -> dict[str, object]:
    """The JSON Schema of an attestation."""
    return Attestation.model_json_schema()
