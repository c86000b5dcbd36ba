"""What every engine build takes and returns, and the checks on the ONNX file that come before any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from patchslim.errors import InputRejected, Unavailable, UsageError

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""GPU architectures that TensorRT-RTX builds for on any machine."""

DEFAULT_TARGETS = TARGETS[1:]
"""All from sm80: Turing (sm75) has no fp32 and no bfloat16 matrix product in TensorRT-RTX."""

Precision = Literal["fp16", "fp32"]
Batch = tuple[int, int, int]
"""Smallest, most usual and largest batch of the optimisation profile."""


@dataclass(frozen=True)
class Progress:
    """One report from a running build: ``step`` of ``total`` steps of ``phase`` are done (``parent``: the phase around it)."""

    target: str
    phase: str
    parent: str | None
    step: int
    total: int


ProgressCallback = Callable[[Progress], bool | None]
"""Called for each report; returning False cancels the build, which then raises KeyboardInterrupt."""


@dataclass(frozen=True)
class EngineResult:
    """What was built, by what and for what, and whether it ran here.

    ``fused_attentions`` is the smallest count over the targets, of ``attentions`` in the ONNX graph; None where the backend
    does not tell (ONNX Runtime). ``kernels``, ``fused`` and ``seconds`` map each target to its own numbers.
    """

    backend: Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
    version: str
    targets: list[str]
    precision: Precision
    batch: Batch
    files: list[Path]
    layers_file: Path | None
    attentions: int
    executed: bool
    reason: str = ""
    kernels: dict[str, int] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def fused_attentions(self) -> int | None:
        return min(self.fused.values()) if len(self.fused) == len(self.targets) else None

    @property
    def status(self) -> Literal["executed", "built, not executed"]:
        return "executed" if self.executed else "built, not executed"

    def summary(self) -> str:
        """One line for the terminal: backend, precision, targets, fused attentions, and whether the engine ran here."""
        parts = [f"{self.backend} {self.version}", self.precision, " ".join(self.targets)]
        if self.fused_attentions is not None:
            parts.append(f"{self.fused_attentions} of {self.attentions} attentions fused")
        elif self.backend != "onnxruntime":
            parts.append("fused attentions not known")
        parts.append(self.status + (f" ({self.reason})" if self.reason else ""))
        return ", ".join(parts)


@dataclass(frozen=True)
class OnnxFacts:
    """What a build needs to know of an ONNX file: its one input, its fixed batch (None: dynamic) and its attention nodes."""

    input_name: str
    image_shape: tuple[int, int, int]
    fixed_batch: int | None
    attentions: list[str]
    precision: Precision | None


def read_onnx(path: Path) -> OnnxFacts:
    """Read the structure of the ONNX file at ``path``; weights in external files are not loaded.

    ``precision`` is the type that most weights have, None in a graph without floating-point weights.

    Raises:
        InputRejected: the file is missing, is not ONNX, has no nodes, or does not take one input of shape
            (batch, channels, height, width) with a static image shape.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise Unavailable('building an engine needs onnx: pip install "patchslim[export]"') from error
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except OSError as error:
        raise InputRejected(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # protobuf's DecodeError has moved between modules from release to release
        raise InputRejected(f"{path}: not an ONNX file, or cut short ({error})") from error
    if not graph.node:
        raise InputRejected(f"{path}: an ONNX graph without nodes; was the export interrupted?")

    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    shape = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    if len(shape) != 4 or not all(shape[1:]):
        found = ", ".join(value.name for value in inputs)
        raise InputRejected(
            f"{path}: expected one input (batch, channels, height, width), only batch dynamic; found {found} {shape or ''}"
        )
    sizes = {onnx.TensorProto.FLOAT: 0, onnx.TensorProto.FLOAT16: 0}
    for tensor in graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += _product(tensor.dims)
    full, half = sizes[onnx.TensorProto.FLOAT], sizes[onnx.TensorProto.FLOAT16]
    return OnnxFacts(
        input_name=inputs[0].name,
        image_shape=(shape[1], shape[2], shape[3]),
        fixed_batch=shape[0] or None,
        attentions=[node.name for node in graph.node if node.op_type in ("Softmax", "Attention")],
        precision=None if full + half == 0 else "fp16" if half > full else "fp32",
    )


def build_engine(
    kind: Literal["ort", "trt"],
    onnx_path: Path,
    output_dir: Path,
    *,
    targets: Sequence[str] | None = None,
    precision: Precision = "fp16",
    batch: Batch = (1, 8, 32),
    progress: ProgressCallback | None = None,
) -> EngineResult:
    """Make ``onnx_path`` ready to run and say what was made.

    ``ort`` opens the file in ONNX Runtime and runs it once. ``trt`` writes ``STEM.TARGET.engine`` per target and one
    ``engine_layers.json`` into ``output_dir``: all of them, or none. ``precision`` must be what the ONNX file says, since
    engines are strongly typed. ``targets`` None means this machine's GPU with full TensorRT, ``DEFAULT_TARGETS`` with
    TensorRT-RTX. An ONNX file with a fixed batch overrides ``batch``.

    Raises:
        UsageError: unknown target, impossible batch, or fp32 for sm75.
        InputRejected: the ONNX file cannot be used, or is of another precision.
        Unavailable: no backend here, or the backend cannot build this graph for a target.
        KeyboardInterrupt: ``progress`` returned False.
    """
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise UsageError(f"batch {batch}: needs 1 <= smallest <= usual <= largest")
    facts = read_onnx(onnx_path)
    if facts.precision not in (None, precision):
        raise InputRejected(
            f"{onnx_path}: {precision} was asked for, but most of its weights are {facts.precision}; engines keep the types "
            f"of the ONNX file, so convert it first or ask for {facts.precision}"
        )
    if facts.fixed_batch:
        batch = (facts.fixed_batch,) * 3
    if kind == "ort":
        from export.engines import ort

        return ort.build(onnx_path, facts, precision=precision, batch=batch)
    from export.engines import tensorrt

    return tensorrt.build(
        onnx_path,
        output_dir,
        facts,
        targets=targets,
        precision=precision,
        batch=batch,
        progress=progress or (lambda report: None),
    )


def _product(dims: Sequence[int]) -> int:
    total = 1
    for dim in dims:
        total *= dim
    return total
