"""Checks of a bundle's ONNX files: their structure, their interface, and what they answer the golden inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from patchslim.errors import InputRejected
from patchslim.ort_runner import CPU, ensure_provider
from patchslim.packages import missing
from patchslim.runner import TensorInfo
from validate.bundle import read_file
from validate.engine_checks import Expected, Running, Trial, check_engines, judged
from validate.engine_runs import EngineRun, Subject
from validate.isolated import IsolatedRunner
from validate.manifest import Manifest, OnnxRecord, TensorSpec
from validate.record_checks import read_golden
from validate.verdict import Check, failed, not_checked

_NEEDED = ("onnx", "onnxruntime")
_ORT_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}


def check_graphs(
    folder: Path, manifest: Manifest, say: Callable[[str], None], how: Running, runs: list[EngineRun]
) -> Iterator[Check]:
    """Every ONNX file has the manifest's interface, and answers the golden inputs as declared in every engine asked for.

    What each came to is added to ``runs``. Other engines are given only what ONNX Runtime, if asked for, found nothing wrong
    with. Without ONNX or ONNX Runtime nothing is run in that, unless a ``provider`` was asked for: then raises ``Unavailable``,
    as it does where that is not here. Raises also as ``check_engines`` does.
    """
    trial = Trial(folder, manifest, read_golden(folder, manifest), how, runs)
    sound = True
    if how.choice.has("ort"):
        for check in _in_onnxruntime(trial, say):
            sound = sound and not check.exit_code
            yield check
    if sound and how.choice.keys != ("ort",):
        yield from check_engines(trial, say)


def _in_onnxruntime(trial: Trial, say: Callable[[str], None]) -> Iterator[Check]:
    provider = trial.how.provider
    if provider is None and (absent := missing(_NEEDED)):
        for record in trial.manifest.onnx:
            yield not_checked("golden parity", record.path, absent)
        return
    ensure_provider(provider or CPU)
    for record in trial.manifest.onnx:
        say(record.path)
        try:
            yield from _check_graph(trial, record)
        except InputRejected as error:
            yield failed("graph", record.path, error)


def _check_graph(trial: Trial, record: OnnxRecord) -> Iterator[Check]:
    from validate.onnx_file import MAX_ONNX_BYTES, beside, check_onnx_bytes

    folder, manifest = trial.folder, trial.manifest
    path = folder / record.path
    if record.max_error is None:
        allowed = set(beside(record.path, [file.path for file in manifest.files]))
        check_onnx_bytes(read_file(folder, manifest, record.path, MAX_ONNX_BYTES), path, allowed)
        yield Check(
            name="golden parity", subject=record.path, status="not executed", detail="declared not to run in ONNX Runtime"
        )
        return
    subject = Subject("ort", folder, record.path, manifest.files)
    interface: list[Check] = []

    def look(runner: IsolatedRunner) -> None:
        expected = [_described(spec, record) for spec in [*manifest.inputs, *manifest.outputs]]
        if (found := [*runner.inputs, *runner.outputs]) != expected:
            here, wanted = ("; ".join(map(str, tensors)) for tensors in (found, expected))
            raise InputRejected(f"{path}: has inputs and outputs {here}, and manifest.json says {wanted}")
        detail = "names, types and shapes are the manifest's"
        interface.append(Check(name="graph", subject=record.path, status="passed", detail=detail))

    try:
        found = trial.run(subject, Expected.of_record(record), look)
    finally:
        yield from interface
    if found.golden is not None and found.golden.non_finite:
        yield judged("finite", subject, found)
        return
    yield Check(name="finite", subject=record.path, status="passed", detail="no NaN and no infinity")
    yield judged("golden parity", subject, found)


def _described(spec: TensorSpec, record: OnnxRecord) -> TensorInfo:
    return TensorInfo(spec.name, _ORT_TYPES[record.dtype], tuple(spec.shape))
