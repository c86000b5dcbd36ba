"""Checks of a bundle's ONNX files: their structure, their interface, and what they answer the golden inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from patchslim.errors import EXIT_PARITY, InputRejected
from patchslim.ort_runner import CPU, TensorInfo, ensure_provider
from patchslim.packages import missing
from patchslim.runner import infer_in_batches
from validate.bundle import read_file
from validate.isolated import IsolatedRunner, Limits
from validate.manifest import Manifest, OnnxRecord, TensorSpec
from validate.record_checks import read_golden
from validate.verdict import Check, failed, not_checked

if TYPE_CHECKING:
    from validate.golden import Golden

_NEEDED = ("onnx", "onnxruntime")
_CHUNK = 8  # images per run of a model with a free batch axis
_ORT_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}


def check_graphs(
    folder: Path, manifest: Manifest, say: Callable[[str], None], limits: Limits, provider: str | None, threads: int
) -> Iterator[Check]:
    """Every ONNX file has the manifest's interface and answers the golden inputs as declared.

    Without ONNX or ONNX Runtime none is looked at, unless a ``provider`` was asked for: then raises ``Unavailable``, as it
    does where that is not here.
    """
    if provider is None and (absent := missing(_NEEDED)):
        for record in manifest.onnx:
            yield not_checked("golden parity", record.path, absent)
        return
    provider = provider or CPU
    ensure_provider(provider)
    golden = read_golden(folder, manifest)
    for record in manifest.onnx:
        say(record.path)
        try:
            yield from _check_graph(folder, manifest, record, golden, limits, provider, threads)
        except InputRejected as error:
            yield failed("graph", record.path, error)


def _check_graph(
    folder: Path, manifest: Manifest, record: OnnxRecord, golden: Golden, limits: Limits, provider: str, threads: int
) -> Iterator[Check]:
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
        yield failed("finite", record.path, fault, EXIT_PARITY)
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
        yield failed("golden parity", record.path, f"{path}: {detail}", EXIT_PARITY)


def _described(spec: TensorSpec, record: OnnxRecord) -> TensorInfo:
    return TensorInfo(spec.name, _ORT_TYPES[record.dtype], tuple(spec.shape))
