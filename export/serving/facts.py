"""What the serving files are told: a few facts of the manifest, in the form that servers take them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from patchslim.packages import wheel_command
from validate.manifest import Manifest, OnnxRecord
from validate.parity import MIN_AGREEMENT, stage_precision
from validate.preprocessing import Preprocessing

#: The largest batch that a server makes, where the engine's own is not known.
_LARGEST_BATCH = 32
_TENSORRT = ("tensorrt", "tensorrt_rtx")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029]+")
#: TensorRT's name of a GPU generation, as sm89, and the last digit apart.
_TARGET = re.compile(r"sm(\d+)(\d)")


@dataclass(frozen=True)
class EngineFile:
    """An engine file by its path in the bundle, and the compute capability of the GPUs that it is for, as ``8.9``."""

    path: str
    capability: str

    @property
    def name(self) -> str:
        """The file's name in the repository of a server."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class ServingFacts:
    """Facts of one bundle; ``labels`` are one for each class, on one line each; ``engines`` those that Triton can load.

    ``name`` is fit for a folder, a URL and a configuration, ``dns_name`` for Kubernetes. ``onnx`` is the file that engines are
    built from, ``runnable`` the one that ONNX Runtime and OpenVINO run, mostly the same; ``ir`` is what OpenVINO runs in its
    place, "" where the bundle has none. ``max_error`` and ``min_agreement`` are what the one that serves must keep on the
    golden images. ``without_weights``: the bundle's recipe builds engine files that a server cannot load. ``install`` is how a
    device gets what checks and builds.
    """

    name: str
    dns_name: str
    model: str
    license: str
    plan_sha256: str
    labels: list[str]
    input: str
    output: str
    shape: tuple[int, int, int]
    classes: int
    max_batch: int
    onnx: str
    runnable: str
    max_error: float
    min_agreement: float
    precision: str
    engines: list[EngineFile]
    rtx: bool
    without_weights: bool
    ir: str
    preprocessing: Preprocessing
    install: str


def serving_facts(manifest: Manifest) -> ServingFacts:
    """The facts of ``manifest``."""
    name = _plain_name(manifest.name)
    batch = manifest.target.get("batch")
    largest = batch[-1] if isinstance(batch, list) and batch and isinstance(batch[-1], int) else _LARGEST_BATCH
    runnable, buildable = _runnable(manifest), _buildable(manifest)
    max_error, min_agreement = runnable.max_error or 0.0, runnable.min_agreement
    engines, ir = manifest.engines_by_stage, ""
    for stage, engine in engines.items():
        if engine.backend == "openvino" and engine.files:
            ir, precision = engine.files[0], stage_precision(stage, engine.precision)
            allowed = next((one.tolerance for one in manifest.rungs if one.stage == stage), None)
            max_error, min_agreement = max(max_error, allowed or 0.0), min(min_agreement, MIN_AGREEMENT[precision])
    channels, height, width = manifest.preprocessing.input_size
    return ServingFacts(
        name=name,
        dns_name=_dns_name(name),
        model=_one_line(manifest.model),
        license=_one_line(manifest.weights.license or ""),
        plan_sha256=manifest.plan_digest,
        labels=_one_line_each(manifest.labels) or [str(number) for number in range(manifest.classes)],
        input=manifest.inputs[0].name,
        output=manifest.outputs[0].name,
        shape=(channels, height, width),
        classes=manifest.classes,
        max_batch=largest,
        onnx=buildable.path,
        runnable=runnable.path,
        max_error=max_error,
        min_agreement=min_agreement,
        precision=manifest.precision,
        engines=_engines(manifest),
        ir=ir,
        rtx=any(one.backend == "tensorrt_rtx" for one in engines.values()),
        without_weights=any(one.weights_from is not None for one in engines.values()),
        preprocessing=manifest.preprocessing,
        install=wheel_command("edge", _one_line(manifest.tools.get("patchslim", "VERSION"))),
    )


def _runnable(manifest: Manifest) -> OnnxRecord:
    """What ONNX Runtime runs: of several engines its own file, or what the first of them was built from."""
    files = [record for record in manifest.onnx if record.dtype == "float32" and record.max_error is not None]
    own = sorted(manifest.engines, key=lambda one: one.engine.backend != "onnxruntime")
    built = [record for one in own for record in files if record.path == one.onnx]
    return built[0] if built else files[-1]


def _buildable(manifest: Manifest) -> OnnxRecord:
    """What TensorRT is given: what its own engine was built from, or what is not quantised, which others' graphs are."""
    files = [record for record in manifest.onnx if record.dtype == "float32"]
    if not manifest.engines and manifest.engine.backend in _TENSORRT:
        return files[-1]
    own = [one.onnx for one in manifest.engines if one.engine.backend in _TENSORRT]
    others = [record for record in files if stage_precision(record.stage) not in ("int8", "fp8")]
    return next((record for record in files if record.path in own), others[0] if manifest.engines else others[-1])


def _plain_name(name: str) -> str:
    """``name`` with nothing but letters, digits, ``_ . -`` of ASCII, beginning with a letter or digit."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:128].lstrip("_.-") or "model"


def _dns_name(name: str) -> str:
    """A label of DNS as Kubernetes takes it: small letters, digits and ``-``, a letter first, at most 40 characters."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"model-{plain}")[:40].rstrip("-")


def _one_line_each(labels: list[str]) -> list[str]:
    """Labels that a file with one on each line can hold."""
    return [_one_line(label) or "?" for label in labels]


def _one_line(text: str) -> str:
    """``text`` with spaces for control characters and line ends."""
    return _CONTROL.sub(" ", text).strip()


def _engines(manifest: Manifest) -> list[EngineFile]:
    """The engines of full TensorRT with weights in them: others are no files that Triton or nvinfer can load."""
    able = [one for one in manifest.engines_by_stage.values() if one.backend == "tensorrt" and one.weights_from is None]
    files = [path for one in able for path in one.files]
    found = [(path, _TARGET.search(path.rpartition("/")[2])) for path in files]
    return [EngineFile(path, f"{target[1]}.{target[2]}") for path, target in found if target is not None]
