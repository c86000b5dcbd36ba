"""What every engine build takes and returns, and which engine takes which precision and target."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from export.engines.batches import Batch
from patchslim.choices import EngineName, Layout, PerformanceHint, Precision
from patchslim.errors import UsageError, did_you_mean
from patchslim.targets import PORTABLE
from validate.fields import Status
from validate.parity_records import EngineRecord


@dataclass(frozen=True)
class EngineTraits:
    """What is known of an engine before anything is built.

    ``targets`` are what it can be built for, each with the precisions that it takes there, the default one first. ``layout`` is
    how a plan's cuts are laid for it. ``graphs`` names, for precisions that the engine makes by itself, that of the ONNX file
    that it is built from; for others the ONNX file is typed. ``rest`` is the type of what a quantised graph leaves as it is.
    """

    targets: Mapping[str, tuple[Precision, ...]]
    layout: Layout
    graphs: Mapping[Precision, Precision] = field(default_factory=dict)
    default: Precision = "fp32"
    rest: Precision = "fp32"

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Every precision that it takes for some target."""
        return tuple(dict.fromkeys(one for precisions in self.targets.values() for one in precisions))

    def graph(self, precision: Precision) -> Precision:
        """The precision of the ONNX file that an engine of this ``precision`` is built from."""
        return self.graphs.get(precision, precision)


ENGINES: dict[EngineName, EngineTraits] = {
    # On a CPU fewer MACs are faster.
    "ort": EngineTraits({"cpu": ("fp32", "fp16", "int8"), "cuda": ("fp32", "fp16")}, "split"),
    "openvino": EngineTraits({"cpu": ("fp32", "bf16", "int8")}, "split", {"bf16": "fp32"}),
    # A packed qkv keeps TensorRT's kernels few.
    "trt": EngineTraits(
        {
            PORTABLE: ("fp16", "bf16", "fp32", "int8"),  # it must run on sm80, which has no fp8; TensorRT-RTX would build it
            "sm75": ("fp16", "int8"),  # Turing has no fp32 and no bfloat16 matrix product in TensorRT-RTX
            "sm80": ("fp16", "bf16", "fp32", "int8"),
            "sm86": ("fp16", "bf16", "fp32", "int8"),
            "sm89": ("fp16", "bf16", "fp32", "int8", "fp8"),
            "sm120": ("fp16", "bf16", "fp32", "int8", "fp8"),
            "sm121": ("fp16", "bf16", "fp32", "int8", "fp8"),
        },
        "packed",
        default="fp16",
        rest="fp16",
    ),
}
"""The engines that can be asked for: which takes which precision on which target. TensorRT's targets are TensorRT-RTX's; full
TensorRT takes the GPU of its machine, in every precision that some target has."""

ALL = "all"
"""In the place of engines' names: those that work here."""


def parse_engines(given: str) -> tuple[EngineName, ...]:
    """The engines that ``--engine`` names, in their order; of ``all``, every one that there is.

    Raises ``UsageError`` for a name that is none, or is given twice.
    """
    if given == ALL:
        return tuple(ENGINES)
    found: list[EngineName] = []
    for word in given.split(","):
        name = next((known for known in ENGINES if known == word.strip()), None)
        if name is None:
            if word.strip() in ("", ALL):
                raise UsageError(f"--engine {given}: {f'{ALL} stands alone' if word.strip() else 'a name is missing'}")
            shown = f"--engine {given}" if word == given else f"--engine {given}: {word}"
            known = f": must be {', '.join(ENGINES)}, several of them with commas, or {ALL}"
            raise UsageError(f"{shown}{did_you_mean(word, [*ENGINES, ALL]) or known}")
        if name in found:
            raise UsageError(f"--engine {given}: names {name} twice")
        found.append(name)
    return tuple(found)


TARGETS = tuple(ENGINES["trt"].targets)

QUANTISED: tuple[Precision, ...] = ("int8", "fp8")
"""The precisions in which a graph says of its tensors which are quantised, and by what scale."""


def default_targets(precision: Precision | None = None) -> tuple[str, ...]:
    """What TensorRT-RTX builds for unless targets are given: one engine, where one per generation would be for speed alone.

    One for each generation that has the ``precision`` where not all that the one engine is for have it.
    """
    targets = ENGINES["trt"].targets
    if precision is None or precision in targets[PORTABLE]:
        return (PORTABLE,)
    return tuple(target for target, precisions in targets.items() if precision in precisions)


def check_precision(engine: EngineName, precision: Precision, targets: Iterable[str] = ()) -> None:
    """Raise ``UsageError`` where ``engine`` does not take ``precision`` for one of ``targets``; without any, for no target."""
    traits = ENGINES[engine]
    if precision not in traits.precisions:
        able = ", ".join(traits.precisions)
        others = [name for name, one in ENGINES.items() if precision in one.precisions]
        with_it = f", or --engine {' or '.join(others)} for {precision}" if others else ""
        raise UsageError(f"--precision {precision}: {engine} takes {able}", next_step=f"choose one of these{with_it}")
    unable = [target for target in targets if precision not in traits.targets.get(target, traits.precisions)]
    if unable:
        named, able = ", ".join(unable), traits.targets[unable[0]][0]
        raise UsageError(
            f"{engine} has no {precision} matrix product for {named}: use --precision {able}, or leave {named} out of --target"
        )


@dataclass(frozen=True)
class BuildProgress:
    """One report from a running build: ``step`` of ``total`` steps of ``phase`` are done (``parent``: the phase around it)."""

    target: str
    phase: str
    parent: str | None
    step: int
    total: int


BuildProgressCallback = Callable[[BuildProgress], bool | None]
"""Called for each report; returning False cancels the build, which then raises KeyboardInterrupt."""


BackendName = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True)
class Backend:
    """What builds and runs an engine, and what for; ``ahead_of_time`` where the targets need not be in this machine."""

    name: BackendName
    targets: tuple[str, ...]
    ahead_of_time: bool = False


@dataclass(frozen=True)
class BuildSettings:
    """What the builder is told beside types and shapes, which the ONNX file and the batch sizes say."""

    tf32: bool = False  # whether float32 products may be rounded to TF32
    workspace: int | None = None  # bytes that a kernel may use beside weights and activations; None: what the GPU has
    optimization_level: int = 3  # 0 builds fastest, 5 tries most
    refit: bool = False  # whether the engine can be given other weights afterwards
    strip_weights: bool = False  # whether the file is without weights, which it is given when it is loaded

    @classmethod
    def default(cls, precision: Precision) -> BuildSettings:
        """What is built with unless a recipe says otherwise: an fp32 engine computes in float32, as it promises."""
        return cls(tf32=precision != "fp32")

    @property
    def flags(self) -> list[str]:
        """TensorRT's ``BuilderFlag`` names of what is asked for beside the default.

        Weights that were stripped come from the same ONNX file, and TensorRT may build as if they stayed so
        (``REFIT_IDENTICAL``); with ``refit`` it may not.
        """
        refit = ["REFIT"] if self.refit else ["REFIT_IDENTICAL"] if self.strip_weights else []
        return [*(["STRIP_PLAN"] if self.strip_weights else []), *refit]


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built: ``targets`` and ``backend`` None leave them to what is installed and visible here.

    ``profiles`` are the optimisation profiles of a TensorRT engine where they are several, which ``batch`` is all of. ``cache``
    is a folder in which what full TensorRT measures is kept for the next build.
    """

    targets: Sequence[str] | None
    precision: Precision
    batch: Batch
    progress: BuildProgressCallback = lambda report: None
    backend: BackendName | None = None
    settings: BuildSettings | None = None  # None: those of the precision
    hint: PerformanceHint = "latency"  # of OpenVINO
    profiles: Sequence[Batch] = ()
    cache: Path | None = None

    @property
    def every_profile(self) -> Sequence[Batch]:
        """``profiles``, or that of ``batch`` alone."""
        return self.profiles or (self.batch,)

    @property
    def builder_settings(self) -> BuildSettings:
        """``settings``, or the default ones."""
        return self.settings or BuildSettings.default(self.precision)


@dataclass(frozen=True)
class EngineResult:
    """What was built, by what and for what, and whether it ran here.

    ``fused_attentions`` is the smallest count over the targets, of ``attentions`` in the ONNX graph; None where the backend
    does not tell (ONNX Runtime, OpenVINO). ``kernels``, ``fused``, ``narrow`` (the share of the tensors between kernels that
    has no more bits than the precision) and ``seconds`` map each target to its own numbers, ``dense_kernels`` those targets
    that the dense model was built for. ``settings`` are what the engine is told, in its own words; ``quantised`` is the share
    of the ONNX file's products that read what is quantised. ``weights`` is the ONNX file that engine files without weights are
    given them from; None: they have their own.
    """

    backend: BackendName
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
    dense_kernels: dict[str, int] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    narrow: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    quantised: float = 0.0
    weights: Path | None = None

    @property
    def fused_attentions(self) -> int | None:
        return min(self.fused.values()) if len(self.fused) == len(self.targets) else None

    @property
    def narrow_share(self) -> float | None:
        """The smallest of ``narrow``; None where some target does not tell."""
        return min(self.narrow.values()) if self.narrow and len(self.narrow) == len(self.targets) else None

    @property
    def status(self) -> Literal["executed", "built, not executed"]:
        return "executed" if self.executed else "built, not executed"

    def summary(self) -> str:
        """One line for the terminal: backend, precision, targets, fused attentions, and whether the engine ran here."""
        parts = [f"{self.backend} {self.version}", self.precision, " ".join(self.targets)]
        if self.fused_attentions is not None:
            parts.append(f"{self.fused_attentions} of {self.attentions} attentions fused")
        elif self.backend not in ("onnxruntime", "openvino"):
            parts.append("fused attentions not known")
        parts += [f"{self.kernels[name]} kernels ({count} dense)" for name, count in self.dense_kernels.items()]
        parts.append(self.status + (f" ({self.reason})" if self.reason else ""))
        return ", ".join(parts)

    def record(self, files: list[str], status: Status, onnx: str) -> EngineRecord:
        """What a manifest or a build says of it; ``files`` are its files' places there, ``onnx`` is that it was built from."""
        return EngineRecord(
            backend=self.backend,
            version=self.version,
            targets=list(self.targets),
            precision=self.precision,
            fused_attentions=self.fused_attentions,
            attentions=self.attentions,
            narrow_share=self.narrow_share,
            files=files,
            settings=self.settings,
            weights_from=None if self.weights is None else onnx,
            status=status,
        )

    def save(self, folder: Path) -> None:
        """Write the record to ``result.json`` in ``folder``, beside the files that lie there; raises ``OSError``.

        Where its ``weights`` lie is not written: whoever loads it knows what it was built from.
        """
        fields = asdict(self)
        fields["files"] = [file.name for file in self.files if file.parent == folder]
        fields["layers_file"] = self.layers_file.name if self.layers_file else None
        fields["weights"] = None
        (folder / "result.json").write_text(json.dumps(fields), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> EngineResult:
        """Read what ``save`` wrote; files that lay elsewhere are not listed. Raises ``OSError``."""
        found = cls(**json.loads((folder / "result.json").read_text(encoding="utf-8")))
        files, layers = [folder / name for name in found.files], found.layers_file
        return replace(found, files=files, layers_file=folder / layers if layers else None, batch=_batch(found.batch))


def _batch(sizes: Sequence[int]) -> Batch:
    smallest, usual, largest = sizes
    return smallest, usual, largest
