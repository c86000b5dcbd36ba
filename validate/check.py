"""Checks a whole bundle without trusting it: no file is parsed before its digest is right, no graph runs before all are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from patchslim.errors import (
    EXIT_DONE,
    EXIT_PARITY,
    EXIT_REJECTED,
    EXIT_UNAVAILABLE,
    InputRejected,
    ParityFailed,
    PatchslimError,
)
from patchslim.plan import SlimPlan
from patchslim.records import MAX_JSON_BYTES, StrictRecord, parse_record
from validate import bundle as files
from validate.bundle import list_files, parse_parity, read_file, read_manifest
from validate.engine_file import check_engine
from validate.isolated import IsolatedRunner, Limits
from validate.manifest import Manifest, OnnxRecord, ParityReport, Status, TensorSpec

if TYPE_CHECKING:
    from patchslim.ort_runner import TensorInfo
    from validate.golden import Golden

Progress = Callable[[str], None]
_MAX_TOTAL = 64 << 30  # bytes of a bundle: a file may be as large as it says and hold nothing, but it would be hashed
_ATTEMPTS = 3  # at a folder whose place other bundles take while it is read
_CHUNK = 8  # images per run of a model with a free batch axis
_ORT_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}


class Check(StrictRecord):
    """One thing looked at: ``name`` says what, ``subject`` which file, ``detail`` what was found."""

    name: str
    subject: str
    status: Status
    detail: str = ""
    exit_code: Literal[0, 3, 4, 5] = EXIT_DONE


class BundleVerdict(StrictRecord):
    """What ``check_bundle`` found; ``manifest`` is None where it could not be read."""

    folder: str
    checks: list[Check]
    manifest: Manifest | None = None
    max_top1_drop: float | None = Field(default=None, description="the build's gate in points; None where it could not be read")

    @property
    def exit_code(self) -> int:
        """0 when the bundle is whole and answers right; 3 broken, 4 cannot be run here, 5 answers wrongly."""
        codes = [check.exit_code for check in self.checks]
        return next((code for code in (EXIT_REJECTED, EXIT_PARITY, EXIT_UNAVAILABLE) if code in codes), EXIT_DONE)

    @property
    def passed(self) -> bool:
        """Whether every check that could be made passed."""
        return self.exit_code == EXIT_DONE

    @property
    def faults(self) -> list[str]:
        """One line for every failed check."""
        return [check.detail for check in self.checks if check.status == "failed"]

    @property
    def error(self) -> PatchslimError | None:
        """``InputRejected`` or ``ParityFailed`` with every fault; None where nothing failed."""
        if self.passed:
            return None
        return (ParityFailed if self.exit_code == EXIT_PARITY else InputRejected)("; ".join(self.faults))

    def raise_if_failed(self) -> None:
        """Raise ``InputRejected`` or ``ParityFailed`` with every fault, or do nothing."""
        if (error := self.error) is not None:
            raise error


def check_bundle(
    folder: Path,
    *,
    provider: str = "CPUExecutionProvider",
    threads: int = 0,
    progress: Progress | None = None,
    limits: Limits | None = None,
    expect_manifest_sha256: str | None = None,
    require_executed: bool = False,
) -> BundleVerdict:
    """Check the bundle in ``folder``: records, files, digests, figures, graphs, and the golden logits in ONNX Runtime.

    A fault of the bundle is in the verdict and never raised; later checks are left out when an earlier one makes them
    meaningless or unsafe. Models run in processes of their own, within ``limits``. ``progress`` is told what is looked at next.

    The digests prove that the files are those of the manifest, and nothing against one who can write the folder: with
    ``expect_manifest_sha256``, which came another way, they do. ``require_executed`` fails a bundle whose engine never ran
    where it was built. Where another bundle takes the folder's place meanwhile, that one is checked. Raises ``Unavailable``
    where ONNX Runtime or ``provider`` is not here.
    """
    say = progress or (lambda _: None)
    before = _identity(folder)
    for _ in range(_ATTEMPTS):
        verdict = _check_bundle(folder, say, limits or Limits(), provider, threads, expect_manifest_sha256, require_executed)
        if verdict.passed or (after := _identity(folder)) == before:
            break
        before = after
    return verdict


def _identity(folder: Path) -> tuple[int, int] | None:
    """What another folder of the same name does not have; None where there is none."""
    with contextlib.suppress(OSError):
        found = folder.stat()
        return found.st_dev, found.st_ino
    return None


def _check_bundle(
    folder: Path,
    say: Progress,
    limits: Limits,
    provider: str,
    threads: int,
    expect_manifest_sha256: str | None,
    require_executed: bool,
) -> BundleVerdict:
    checks: list[Check] = []
    manifest: Manifest | None = None
    gate: float | None = None
    say("manifest.json")
    try:
        if not folder.is_dir():
            raise InputRejected(f"{folder}: is not a folder")
        manifest, sha256 = read_manifest(folder)
        if expect_manifest_sha256 is not None and sha256 != expect_manifest_sha256.lower():
            raise InputRejected(f"{folder / files.MANIFEST}: its SHA-256 is {sha256}, not {expect_manifest_sha256.lower()}")
        known = "of the digest expected" if expect_manifest_sha256 else f"SHA-256 {sha256}"
        checks.append(Check(name="manifest", subject=files.MANIFEST, status="passed", detail=f"valid, version 1, {known}"))
        for stage in (_check_files, _check_records):
            found = list(stage(folder, manifest, say))
            checks += found
            if any(check.exit_code for check in found):
                break
        else:
            checks += _check_engine_ran(manifest, require_executed)
            checks += _check_graphs(folder, manifest, say, limits, provider, threads)
    except (InputRejected, OSError) as error:  # OSError: a file went away after it was listed
        checks.append(_failed("manifest" if manifest is None else "bundle", str(folder), str(error)))
    if manifest is not None and any(check.name == "files" and check.status == "passed" for check in checks):
        with contextlib.suppress(InputRejected):  # said already
            gate = _read_parity(folder, manifest).gate.max_top1_drop
    return BundleVerdict(folder=str(folder), checks=checks, manifest=manifest, max_top1_drop=gate)


def _failed(name: str, subject: str, fault: PatchslimError | str, code: Literal[3, 4, 5] = EXIT_REJECTED) -> Check:
    return Check(name=name, subject=subject, status="failed", detail=str(fault), exit_code=code)


def _check_files(folder: Path, manifest: Manifest, say: Progress) -> Iterator[Check]:
    """Every listed file is there with its size and digest, and nothing else is. All sizes are looked at before any hashing."""
    present = set(list_files(folder)) - {files.MANIFEST}
    listed = {record.path for record in manifest.files}
    faults = [_failed("files", name, f"{folder / name}: is not listed in manifest.json") for name in sorted(present - listed)]
    for record in manifest.files:
        path = folder / record.path
        if record.path not in present:
            faults.append(_failed("files", record.path, f"{path}: is missing, but manifest.json lists it"))
        elif (size := path.lstat().st_size) != record.size:
            fault = f"{path}: has {size} bytes, not {record.size}: truncated or replaced"
            faults.append(_failed("files", record.path, fault))
    total = sum(record.size for record in manifest.files)
    if total > _MAX_TOTAL:
        faults.append(_failed("files", "all", f"{folder}: its files have {total} bytes, more than the {_MAX_TOTAL} allowed"))
    yield from faults
    if total > _MAX_TOTAL:
        return
    for record in manifest.files:
        if any(fault.subject == record.path for fault in faults):
            continue
        say(record.path)
        if files.digest(folder / record.path) != record.sha256:
            fault = f"{folder / record.path}: its SHA-256 is not the one in manifest.json: corrupt or replaced"
            faults.append(_failed("files", record.path, fault))
            yield faults[-1]
    if not faults:
        yield Check(name="files", subject="all", status="passed", detail=f"{len(listed)} listed, {total} bytes")


def _check_records(folder: Path, manifest: Manifest, say: Progress) -> Iterator[Check]:
    """``plan.json``, ``parity.json``, ``golden.npz`` and engines are what the manifest says; the build's gate was passed."""
    from validate.figures import contradictions, failed_stages

    say(files.PLAN)
    try:
        _check_plan(folder, manifest)
        yield Check(name="plan", subject=files.PLAN, status="passed", detail=f"{manifest.tokens_per_block} tokens per block")
    except InputRejected as error:
        yield _failed("plan", files.PLAN, error)
    for name in manifest.engine.files:
        try:
            if name not in [record.path for record in manifest.onnx]:
                check_engine(folder / name, manifest.engine.backend)
                yield Check(name="engine", subject=name, status="passed", detail=f"the header is {manifest.engine.backend}'s")
        except InputRejected as error:
            yield _failed("engine", name, error)
    path = folder / files.PARITY
    try:
        report = _read_parity(folder, manifest)
        for field in ("macs", "rungs", "engine", "evaluation"):
            if getattr(report, field) != getattr(manifest, field):
                raise InputRejected(f"{path}: {field} is not what manifest.json says")
        for fault in contradictions(report):
            raise InputRejected(f"{path}: {fault}")
    except InputRejected as error:
        yield _failed("parity report", files.PARITY, error)
        return
    gate = f"gate of {report.gate.max_top1_drop:g} points"
    if failed := failed_stages(report):
        yield _failed(
            "parity report", files.PARITY, f"{path}: the build did not pass its {gate}: {', '.join(failed)}", EXIT_PARITY
        )
        return
    detail = f"{len(report.rungs)} stages, {gate}, recomputed"
    yield Check(name="parity report", subject=files.PARITY, status="passed", detail=detail)
    yield _check_golden(folder, manifest, report, say)


def _check_golden(folder: Path, manifest: Manifest, report: ParityReport, say: Progress) -> Check:
    """``golden.npz`` is well formed, and what it shows is not more than what the report admits and the manifest allows."""
    from validate.figures import golden_contradictions, overgenerous

    say(files.GOLDEN)
    try:
        golden = _read_golden(folder, manifest)
        for fault in golden_contradictions(report, golden):
            raise InputRejected(f"{folder / files.PARITY}: {fault}")
        for fault in overgenerous(manifest, golden):
            raise InputRejected(f"{folder / files.MANIFEST}: {fault}")
    except InputRejected as error:
        return _failed("golden", files.GOLDEN, error)
    return Check(
        name="golden", subject=files.GOLDEN, status="passed", detail=f"{len(golden.labels)} images, as the figures say"
    )


def _check_engine_ran(manifest: Manifest, required: bool) -> Iterator[Check]:
    engine = manifest.engine
    if engine.status != "not executed":
        return
    detail = f"the engine ({engine.backend} for {', '.join(engine.targets) or 'no target'}) never ran where it was built"
    if required:
        yield _failed("engine ran", "engine", f"{detail}, and --require-executed asks for that", EXIT_PARITY)
    else:
        yield Check(name="engine ran", subject="engine", status="not executed", detail=detail)


def _check_plan(folder: Path, manifest: Manifest) -> None:
    """Raise ``InputRejected`` unless the plan is valid and all that the manifest says of it follows from it."""
    path = folder / files.PLAN
    data = read_file(folder, manifest, files.PLAN, MAX_JSON_BYTES)
    if next(file.sha256 for file in manifest.files if file.path == files.PLAN) != manifest.plan_digest:
        raise InputRejected(f"{path}: its SHA-256 is not manifest.json's plan_digest")
    plan = parse_record(data, SlimPlan, "plan", path)
    calibration = plan.origin.calibration
    derived: dict[str, tuple[object, object]] = {
        "model": (plan.model, manifest.model),
        "tokens per block": (plan.counts, manifest.tokens_per_block),
        "macs.dense": (plan.dense_macs(), manifest.macs.dense),
        "macs.slim": (plan.macs(manifest.macs.layout), manifest.macs.slim),
    }
    if (stated := manifest.calibration) is not None:
        derived["calibration"] = (
            None if calibration is None else (calibration.data, calibration.images, calibration.fingerprint),
            (stated.data, stated.images, stated.fingerprint),
        )
    for field, (of_plan, of_manifest) in derived.items():
        if of_plan != of_manifest:
            raise InputRejected(f"{path}: {field} of the plan: {of_plan}, and manifest.json says {of_manifest}")


def _read_parity(folder: Path, manifest: Manifest) -> ParityReport:
    return parse_parity(folder, read_file(folder, manifest, files.PARITY, files.MAX_RECORD_BYTES))


def _read_golden(folder: Path, manifest: Manifest) -> Golden:
    from validate.golden import most_bytes, parse_golden

    size, classes = manifest.preprocessing.input_size, manifest.classes
    data = read_file(folder, manifest, files.GOLDEN, most_bytes(size, classes))
    return parse_golden(data, folder / files.GOLDEN, size, classes)


def _check_graphs(
    folder: Path, manifest: Manifest, say: Progress, limits: Limits, provider: str, threads: int
) -> Iterator[Check]:
    """Every ONNX file has the manifest's interface and answers the golden inputs as declared."""
    from patchslim.ort_runner import ensure_provider

    ensure_provider(provider)
    golden = _read_golden(folder, manifest)
    for record in manifest.onnx:
        say(record.path)
        try:
            yield from _check_graph(folder, manifest, record, golden, limits, provider, threads)
        except InputRejected as error:
            yield _failed("graph", record.path, error)


def _check_graph(
    folder: Path, manifest: Manifest, record: OnnxRecord, golden: Golden, limits: Limits, provider: str, threads: int
) -> Iterator[Check]:
    from patchslim.runner import infer_in_batches
    from validate.onnx_file import MAX_ONNX_BYTES, beside, check_onnx_bytes
    from validate.parity import rung

    path = folder / record.path
    if record.max_error is None:
        allowed = set(beside(record.path, [file.path for file in manifest.files]))
        check_onnx_bytes(read_file(folder, manifest, record.path, MAX_ONNX_BYTES), path, allowed)
        yield Check(
            name="golden parity", subject=record.path, status="not executed", detail="declared not to run in ONNX Runtime"
        )
        return
    with IsolatedRunner(folder, manifest, record.path, limits, provider=provider, threads=threads) as runner:
        expected = [_described(spec, record) for spec in [*manifest.inputs, *manifest.outputs]]
        if (found := [*runner.inputs, *runner.outputs]) != expected:
            here, wanted = ("; ".join(map(str, tensors)) for tensors in (found, expected))
            raise InputRejected(f"{path}: has inputs and outputs {here}, and manifest.json says {wanted}")
        yield Check(name="graph", subject=record.path, status="passed", detail="names, types and shapes are the manifest's")
        logits = infer_in_batches(runner, golden.inputs, _CHUNK)
    if logits.shape[1] != manifest.classes:
        raise InputRejected(f"{path}: answers {logits.shape[1]} classes, not {manifest.classes}")
    measured = rung(
        record.stage,
        logits,
        None,
        golden.slim_logits,
        golden.slim_logits,
        compared_to="pytorch-slim",
        tolerance=record.max_error,
    )
    if measured.non_finite:
        fault = f"{path}: {measured.non_finite} of its logits on the golden inputs are NaN or infinite"
        yield _failed("finite", record.path, fault, EXIT_PARITY)
        return
    yield Check(name="finite", subject=record.path, status="passed", detail="no NaN and no infinity")
    detail = (
        f"max error {measured.max_error:.3g} of {record.max_error:.3g} allowed, "
        f"top-1 agreement {measured.agreement:g} % of {record.min_agreement:g} % needed"
    )
    right = (measured.max_error or 0.0) <= record.max_error and (measured.agreement or 0.0) >= record.min_agreement
    if right:
        yield Check(name="golden parity", subject=record.path, status="passed", detail=detail)
    else:
        yield _failed("golden parity", record.path, f"{path}: {detail}", EXIT_PARITY)


def _described(spec: TensorSpec, record: OnnxRecord) -> TensorInfo:
    from patchslim.ort_runner import TensorInfo

    return TensorInfo(spec.name, _ORT_TYPES[record.dtype], tuple(spec.shape))
