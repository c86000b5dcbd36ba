"""Checks a whole bundle without trusting it: no file is parsed before its digest is right, no graph runs before all are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from patchslim.errors import (
    EXIT_DONE,
    EXIT_PARITY,
    EXIT_REJECTED,
    EXIT_UNAVAILABLE,
    InputRejected,
    ParityFailed,
    PatchslimError,
)
from patchslim.plan import load_plan
from patchslim.records import StrictRecord
from validate import bundle as files
from validate.bundle import list_files, load_manifest, load_parity
from validate.manifest import Manifest, OnnxRecord, Status, TensorSpec

if TYPE_CHECKING:
    from patchslim.ort_runner import TensorInfo
    from validate.golden import Golden

Progress = Callable[[str], None]
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

    def raise_if_failed(self) -> None:
        """Raise ``InputRejected`` or ``ParityFailed`` with every fault, or do nothing."""
        if not self.passed:
            raise (ParityFailed if self.exit_code == EXIT_PARITY else InputRejected)("; ".join(self.faults))


def check_bundle(
    folder: Path, *, provider: str = "CPUExecutionProvider", threads: int = 0, progress: Progress | None = None
) -> BundleVerdict:
    """Check the bundle in ``folder``: records, files, digests, graphs, and the golden logits in ONNX Runtime.

    A fault of the bundle is in the verdict and never raised; later checks are left out when an earlier one makes them
    meaningless or unsafe. ``progress`` is told what is looked at next. Raises ``Unavailable`` where ONNX Runtime or
    ``provider`` is not here.
    """
    say = progress or (lambda _: None)
    checks: list[Check] = []
    manifest: Manifest | None = None
    say("manifest.json")
    try:
        if not folder.is_dir():
            raise InputRejected(f"{folder}: is not a folder")
        manifest = load_manifest(folder)
        checks.append(Check(name="manifest", subject=files.MANIFEST, status="passed", detail="valid, version 1"))
        for stage in (_check_files, _check_records):
            found = list(stage(folder, manifest, say))
            checks += found
            if any(check.exit_code for check in found):
                return BundleVerdict(folder=str(folder), checks=checks, manifest=manifest)
        checks += _check_graphs(folder, manifest, provider, threads, say)
    except InputRejected as error:
        checks.append(_failed("manifest" if manifest is None else "bundle", str(folder), error))
    return BundleVerdict(folder=str(folder), checks=checks, manifest=manifest)


def _failed(name: str, subject: str, fault: PatchslimError | str, code: Literal[3, 4, 5] = EXIT_REJECTED) -> Check:
    return Check(name=name, subject=subject, status="failed", detail=str(fault), exit_code=code)


def _check_files(folder: Path, manifest: Manifest, say: Progress) -> Iterator[Check]:
    """Every listed file is there with its size and digest, and nothing else is. Sizes are looked at before hashing."""
    present = set(list_files(folder)) - {files.MANIFEST}
    listed = {record.path for record in manifest.files}
    for name in sorted(present - listed):
        yield _failed("files", name, f"{folder / name}: is not listed in manifest.json")
    for record in manifest.files:
        path = folder / record.path
        if record.path not in present:
            yield _failed("files", record.path, f"{path}: is missing, but manifest.json lists it")
        elif (size := path.stat().st_size) != record.size:
            yield _failed("files", record.path, f"{path}: has {size} bytes, not {record.size}: truncated or replaced")
        else:
            say(record.path)
            if files.digest(path) != record.sha256:
                yield _failed("files", record.path, f"{path}: its SHA-256 is not the one in manifest.json: corrupt or replaced")
    if present == listed:
        total = sum(record.size for record in manifest.files)
        yield Check(name="files", subject="all", status="passed", detail=f"{len(listed)} listed, {total} bytes")


def _check_records(folder: Path, manifest: Manifest, say: Progress) -> Iterator[Check]:
    """``plan.json`` and ``parity.json`` say what the manifest says, and the build's own gate was passed."""
    say(files.PLAN)
    plan = folder / files.PLAN
    try:
        _check_plan(plan, manifest)
        yield Check(name="plan", subject=files.PLAN, status="passed", detail=f"{manifest.tokens_per_block} tokens per block")
    except InputRejected as error:
        yield _failed("plan", files.PLAN, error)
    path = folder / files.PARITY
    try:
        report = load_parity(folder)
        for field in ("macs", "rungs", "engine", "evaluation"):
            if getattr(report, field) != getattr(manifest, field):
                raise InputRejected(f"{path}: {field} is not what manifest.json says")
    except InputRejected as error:
        yield _failed("parity report", files.PARITY, error)
        return
    if report.passed:
        yield Check(name="parity report", subject=files.PARITY, status="passed", detail=f"{len(report.rungs)} stages")
    else:
        stages = ", ".join(rung.stage for rung in report.rungs if rung.status == "failed") or "every stage after the original"
        yield _failed("parity report", files.PARITY, f"{path}: the build did not pass its gate: {stages}", EXIT_PARITY)


def _check_plan(path: Path, manifest: Manifest) -> None:
    """Raise ``InputRejected`` unless the plan is valid and all that the manifest says of it follows from it."""
    if files.digest(path) != manifest.plan_digest:
        raise InputRejected(f"{path}: its SHA-256 is not manifest.json's plan_digest")
    plan = load_plan(path)
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


def _check_graphs(folder: Path, manifest: Manifest, provider: str, threads: int, say: Progress) -> Iterator[Check]:
    """Every ONNX file has the manifest's interface and answers the golden inputs as declared."""
    from validate.golden import read_golden

    say(files.GOLDEN)
    try:
        golden = read_golden(folder / files.GOLDEN, manifest.preprocessing.input_size, manifest.classes)
        yield Check(name="golden", subject=files.GOLDEN, status="passed", detail=f"{len(golden.labels)} images")
    except InputRejected as error:
        yield _failed("golden", files.GOLDEN, error)
        return
    for record in manifest.onnx:
        say(record.path)
        try:
            yield from _check_graph(folder, manifest, record, golden, provider, threads)
        except InputRejected as error:
            yield _failed("graph", record.path, error)


def _check_graph(
    folder: Path, manifest: Manifest, record: OnnxRecord, golden: Golden, provider: str, threads: int
) -> Iterator[Check]:
    from patchslim.ort_runner import OrtRunner
    from patchslim.runner import infer_in_batches
    from validate.onnx_file import check_onnx
    from validate.parity import rung

    path = folder / record.path
    base = PurePosixPath(record.path).parent
    check_onnx(path, {str(PurePosixPath(f.path).relative_to(base)) for f in manifest.files if _inside(f.path, base)})
    if record.max_error is None:
        yield Check(
            name="golden parity", subject=record.path, status="not executed", detail="declared not to run in ONNX Runtime"
        )
        return
    with OrtRunner(path, provider=provider, threads=threads) as runner:
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


def _inside(path: str, base: PurePosixPath) -> bool:
    return PurePosixPath(path).is_relative_to(base)
