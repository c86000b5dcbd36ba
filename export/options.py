"""The options of ``python -m export.run``: names, defaults and help in one place."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from export.engines.base import (
    ENGINES,
    QUANTISED,
    BuildSettings,
    check_precision,
    parse_engines,
)
from export.engines.batches import DEFAULT_BATCH, Batch, all_of, batches_given, parse_batches
from patchslim.choices import EngineName, Layout, PerformanceHint, Precision
from patchslim.environment import processes
from patchslim.errors import UsageError
from patchslim.work_folder import default_work
from slimming.options import DEFAULT_MARGIN, ModelOptions
from slimming.search.budget import LATENCY
from slimming.search.request import PlanRequest
from validate.fields import GateRule

#: Of a workspace in a build recipe, in MiB.
_MOST_WORKSPACE = 1 << 20


@dataclass(frozen=True)
class PlanGroup:
    """What is cut, where no plan is to be searched."""

    plan: Path | None = None
    """Use this plan.json instead of searching for one."""
    dense: bool = False
    """Export the model unslimmed."""


@dataclass(frozen=True)
class EngineGroup:
    """What the bundle is built for."""

    engine: Annotated[str, tyro.conf.arg(metavar="ort|openvino|trt|A,B,...|all")] = "ort"
    """ort: ONNX Runtime. openvino: OpenVINO on a CPU. trt: TensorRT for this machine's GPU, or TensorRT-RTX ahead of time where
    there is none. Several with commas, the one to be served first, make one bundle; all: those that work here."""
    target: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...] | str, ...]],
        tyro.conf.arg(metavar="portable|sm75|sm80|sm86|sm89|sm120|sm121"),
    ] = ()
    """GPU generations to build TensorRT-RTX engines for: several with spaces, commas or again. Default: portable, one engine
    for sm80, sm86, sm89 and from sm120 on."""
    precision: Precision | Literal["auto"] | None = None
    """Type of the engine's weights and activations. int8 is quantised on the calibration images by NNCF, for trt by ModelOpt;
    so is fp8, for trt alone (sm89, and from sm120 on). The rest is then bf16 in openvino, fp16 in trt. auto, the default of
    openvino: the fastest here that passes the gate. Default: fp16 for trt, fp32 for ort."""
    batch: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="MIN:USUAL:MAX,...")] = ()
    """Batch sizes that a TensorRT engine takes, the one that it is fastest at in the middle; one number for all three. Several,
    with commas or again, are as many optimisation profiles of one engine, of which each batch runs in the narrowest that takes
    it. Default: 1:8:32."""
    workspace: Annotated[int | None, tyro.conf.arg(metavar="MIB")] = None
    """Memory that a kernel of a TensorRT engine may use beside weights and activations. Default: what the GPU has."""
    optimization_level: int | None = None
    """Of TensorRT's builder: 0 builds fastest, 5 tries most. Default: 3."""
    refit: bool = False
    """Build a TensorRT engine that can be given the weights of another ONNX file of this graph. Needs a GPU."""
    strip_weights: bool = False
    """Leave the weights out of TensorRT's engine file: it is given them from the bundle's ONNX file when it is loaded. Needs
    a GPU."""
    hint: PerformanceHint = "latency"
    """What OpenVINO is told: to give all cores to one batch (latency), or to run several at once (throughput)."""
    mixed: Literal["auto", "none"] = "auto"
    """Where int8 or fp8 fails the gate: keep as few blocks as need be, or the patch embedding, in higher precision, those that
    lose most first, and say which; or keep none, and fail."""
    keep_fp32: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PATTERN")] = ()
    """Nodes that int8 or fp8 leaves as they are: a regular expression that is found in their names. May be given again."""


@dataclass(frozen=True)
class GateGroup:
    """How every stage is measured, and how much top-1 it may lose."""

    eval_images: int | Literal["all"] = 2000
    """Held-out images that every stage is measured on."""
    max_top1_drop: float = DEFAULT_MARGIN
    """Points of top-1 that any stage may lose against the PyTorch original; more means exit code 5 and no bundle."""
    gate: GateRule = "point"
    """What must be within --max-top1-drop: the drop itself (point), or the bad end of its 95 % interval (confidence). Where the
    images can tell neither way, confidence says undecided (exit code 5), and how many images would settle it."""
    require_executed: bool = False
    """Exit code 5 and no bundle where the engine did not run here, as one for another machine's GPU."""
    require_fused_attention: bool = False
    """Exit code 5 and no bundle where TensorRT did not make one kernel of every attention, in every engine."""
    bisect: bool = False
    """Compare the ONNX stages block by block as well, and name the first block that is too far off. Done without being asked
    where a stage's logits are."""
    measure_latency: bool = True
    """Time the slim graph against the dense one on this CPU, a few seconds, for latency.json and the report. Without it the
    same command gives the same bytes everywhere."""
    batch_size: int = 8
    """Images per run while measuring. On a CPU, few at a time are fastest: they stay in its caches."""


@dataclass(frozen=True)
class OutputGroup:
    """What is written, kept and printed."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The bundle's folder. Default: bundles/MODEL-ENGINE, or bundles/MODEL-ENGINE-ENGINE of several."""
    license: str | None = None
    """The licence of the weights, as an SPDX name, for the manifest and the ONNX files. Default: what their record says."""
    sign: Annotated[Path | None, tyro.conf.arg(metavar="KEY")] = None
    """Sign the bundle with this private key: elliptic curve, PEM, no password (openssl genpkey -algorithm EC)."""
    work: Path | None = None
    """Where finished stages are kept, so that a second or interrupted run continues. Default: ~/.cache/patchslim."""
    dry_run: bool = False
    """Say what would be done and which stages are already there, and stop."""
    list_engines: bool = False
    """Say which engine takes which precision on which target, and what of that works here, and stop."""
    json: bool = False
    """Print one JSON object on stdout; logs stay on stderr."""


@dataclass(frozen=True)
class ExportOptions(OutputGroup, GateGroup, EngineGroup, PlanGroup, ModelOptions):
    """Take a Vision Transformer from PyTorch weights to a checked hand-off bundle."""

    def check(self) -> None:
        """Raise ``UsageError`` for values that no run could use."""
        super().check()
        if self.plan is not None and self.dense:
            raise UsageError("--plan and --dense contradict each other")
        if (self.plan is not None or self.dense) and self.given_budgets:
            chosen = "--dense" if self.dense else "--plan"
            raise UsageError(f"{chosen} and {self.given_budgets[0]} contradict each other", next_step="leave one of them out")
        if (self.plan is not None or self.dense) and self.merge_blocks is not None:
            raise UsageError(f"{'--dense' if self.dense else '--plan'} and --merge-blocks contradict each other")
        if self.eval_images != "all" and self.eval_images < 1:
            raise UsageError(f"--eval-images {self.eval_images}: must be at least 1, or all")
        if not 0 <= self.max_top1_drop <= 100:
            raise UsageError(f"--max-top1-drop {self.max_top1_drop}: must be from 0 to 100 points")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: must be at least 1")
        if processes() > 1:
            raise UsageError("export.run is one process: run slimming.run under torchrun, then export.run with its --plan")
        if self.target and "trt" not in self.engines:
            raise UsageError("--target needs --engine trt")
        if self.require_fused_attention and "trt" not in self.engines:
            raise UsageError("--require-fused-attention needs --engine trt: other engines do not say what they fused")
        if self.batch_profiles != (DEFAULT_BATCH,) and "trt" not in self.engines:
            raise UsageError(f"--batch {batches_given(self.batch)} needs --engine trt: the others take any batch")
        if self.workspace is not None and not 1 <= self.workspace <= _MOST_WORKSPACE:
            raise UsageError(f"--workspace {self.workspace}: must be from 1 to {_MOST_WORKSPACE} MiB")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"--optimization-level {self.optimization_level}: must be from 0 to 5")
        for option, value in (("--workspace", self.workspace), ("--optimization-level", self.optimization_level)):
            if value is not None and "trt" not in self.engines:
                raise UsageError(f"{option} {value} needs --engine trt: it is TensorRT's builder that takes it")
        for option, asked in (("--refit", self.refit), ("--strip-weights", self.strip_weights)):
            if asked and "trt" not in self.engines:
                raise UsageError(f"{option} needs --engine trt: only TensorRT's engines have weights of their own")
        for engine in self.engines:
            check_precision(engine, self.for_engine(engine).engine_precision)
            if self.precision == "auto" and engine != "openvino":
                able = ", ".join(ENGINES[engine].precisions)
                raise UsageError(f"--precision auto is for --engine openvino; {engine} takes {able}")
        if self.hint != "latency" and "openvino" not in self.engines:
            raise UsageError(f"--hint {self.hint} is for --engine openvino")
        if self.hint != "latency" and self.budget.criterion in LATENCY:
            raise UsageError(f"--hint {self.hint} and {self.given_budgets[0]} contradict each other")
        if self.keep_fp32 and not any(self.for_engine(engine).may_be_quantised for engine in self.engines):
            raise UsageError("--keep-fp32 is for --precision int8 and fp8")
        for pattern in self.keep_fp32:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"--keep-fp32 {pattern}: is no regular expression: {error}") from error
        if self.precision in (*QUANTISED, "auto") and self.given_budgets and self.budget.criterion in LATENCY:
            given = "int8" if self.precision == "auto" else self.precision
            raise UsageError(
                f"a latency budget is timed on single blocks, which {given} is not made for", next_step="use --precision bf16"
            )

    def check_inputs(self) -> None:
        """Raise ``InputRejected`` where what the options name is not there, or is no plan. Quick: nothing is loaded."""
        super().check_inputs()
        if self.sign is not None:
            from patchslim.signatures import check_private_key

            check_private_key(self.sign)
        if self.plan is not None:
            from patchslim.plan import load_plan

            load_plan(self.plan)

    @property
    def targets(self) -> tuple[str, ...]:
        """``--target``, one name each, however they were given."""
        groups = ((group,) if isinstance(group, str) else group for group in self.target)
        return tuple(name for group in groups for word in group for name in word.split(",") if name)

    @property
    def margin(self) -> float:
        """``--max-top1-drop``."""
        return self.max_top1_drop

    @property
    def batch_profiles(self) -> tuple[Batch, ...]:
        """``--batch``: smallest, most usual and largest batch of each profile. Raises ``UsageError`` for what is none."""
        return parse_batches(self.batch)

    @property
    def batch_profile(self) -> Batch:
        """What all of ``batch_profiles`` take together."""
        return all_of(self.batch_profiles)

    @property
    def builder_settings(self) -> BuildSettings | None:
        """What TensorRT's builder is told; None for the defaults of the precision."""
        settings = BuildSettings.default(self.engine_precision)
        settings = dataclasses.replace(settings, refit=self.refit, strip_weights=self.strip_weights)
        if self.workspace is not None:
            settings = dataclasses.replace(settings, workspace=self.workspace << 20)
        if self.optimization_level is not None:
            settings = dataclasses.replace(settings, optimization_level=self.optimization_level)
        return None if settings == BuildSettings.default(self.engine_precision) else settings

    @property
    def engines(self) -> tuple[EngineName, ...]:
        """The engines of ``--engine``, the one to be served first. Raises ``UsageError`` for what are none."""
        return parse_engines(self.engine)

    @property
    def primary(self) -> EngineName:
        """The first of the engines: what is said of one engine is said of this one."""
        return self.engines[0]

    def for_engine(self, engine: EngineName) -> ExportOptions:
        """The options of one of several engines, without those that are for others."""
        alone = dataclasses.replace(self, engine=engine)
        if engine != "trt":
            plain = EngineGroup()
            alone = dataclasses.replace(alone, target=plain.target, batch=plain.batch, require_fused_attention=False)
            alone = dataclasses.replace(alone, workspace=None, optimization_level=None, refit=False, strip_weights=False)
        if engine != "openvino":
            alone = dataclasses.replace(alone, hint="latency")
        return alone if alone.may_be_quantised else dataclasses.replace(alone, keep_fp32=())

    @property
    def layout(self) -> Layout:
        """How cuts are laid, as suits the first engine."""
        return ENGINES[self.primary].layout

    @property
    def search_layout(self) -> Layout:
        """The layout of the search: packed where an engine's is, whose kernels are fewest where tokens go by its default."""
        return "packed" if any(ENGINES[engine].layout == "packed" for engine in self.engines) else "split"

    @property
    def other_layouts(self) -> tuple[Layout, ...]:
        """The layouts of engines that are not that of the search; a budget of MACs is kept in them too."""
        return tuple({ENGINES[engine].layout: None for engine in self.engines if ENGINES[engine].layout != self.search_layout})

    def request(self, layout: Layout = "split") -> PlanRequest:
        """Return what is asked of the plan, searched in ``layout``, and to be laid as suits every engine."""
        return dataclasses.replace(super().request(layout), also=self.other_layouts)

    @property
    def engine_precision(self) -> Precision:
        """``--precision``, or the first engine's default; where that is chosen by what is measured, what is tried first."""
        return ENGINES[self.primary].default if self.precision is None or self.precision == "auto" else self.precision

    @property
    def chooses_precision(self) -> bool:
        """Whether the fastest precision of the first engine that passes is taken."""
        unsaid = self.precision is None and self.primary == "openvino" and self.budget.criterion not in LATENCY
        return unsaid or self.precision == "auto"

    @property
    def may_be_quantised(self) -> bool:
        """Whether the first engine is, or may come to be, in INT8 or FP8."""
        return self.engine_precision in QUANTISED or self.chooses_precision

    @property
    def bundle(self) -> Path:
        """``--output``, or its default."""
        return self.output or Path("bundles") / "-".join([self.model.replace("/", "_"), *self.engines])

    @property
    def work_folder(self) -> Path:
        """``--work``, or its default."""
        return self.work or default_work()
