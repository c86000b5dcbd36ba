"""``parity.json``: what every stage of an export answers, and whether that passes; strict and versioned. Free of numpy."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

from pydantic import Field, JsonValue, SerializerFunctionWrapHandler, model_serializer, model_validator

from patchslim.choices import Layout
from patchslim.records import StrictRecord, VersionOne
from validate.fields import (
    Count,
    Error,
    GateRule,
    Images,
    Milliseconds,
    Name,
    Percent,
    PlainPath,
    Points,
    Size,
    StageName,
    Status,
    Text,
)

_MOST_CLASSES = 1 << 16
_ROUNDING = 1e-6  # points and percentages are written as floats; the integer counts beside them are the truth


class Macs(StrictRecord):
    """Multiply-accumulates of one image."""

    dense: Count
    slim: Count
    reduction: Annotated[float, Field(ge=0, le=1)] = Field(description="fraction saved: 1 - slim / dense")
    layout: Layout = Field(description="how the cut blocks' projections are laid")

    @model_validator(mode="after")
    def _check(self) -> Macs:
        if not self.dense or abs(self.reduction - (1 - self.slim / self.dense)) > _ROUNDING:
            raise ValueError(f"reduction: {self.reduction} is not 1 - {self.slim} / {self.dense}")
        return self


class BatchCheck(StrictRecord):
    """The golden inputs run again in batches of other sizes: an answer must not depend on what is beside it."""

    sizes: list[Size] = Field(min_length=1, max_length=16, description="images per run, the last of which may be smaller")
    max_error: Error | None = Field(description="largest difference of a logit; null where none is finite on both sides")
    tolerance: Error = Field(description="largest max_error allowed")


class Rung(StrictRecord):
    """One stage of an export, measured on the evaluation images.

    Slimming loss and numerical loss are never one number: ``top1_drop`` is against the original, ``max_error`` against the
    stage named in ``compared_to``.
    """

    stage: StageName
    images: Images
    top1: Percent | None = Field(default=None, description="percent; null where the images have no labels")
    top5: Percent | None = None
    top1_drop: Points | None = Field(default=None, description="points lost against the original; negative is a gain")
    lost: Images | None = Field(default=None, description="images that the original answers rightly and this stage wrongly")
    gained: Images | None = Field(default=None, description="images that the original answers wrongly and this stage rightly")
    drop_interval: tuple[Points, Points] | None = Field(default=None, description="95 % confidence interval of top1_drop")
    agreement: Percent | None = Field(default=None, description="percent of images whose top-1 equals the original's")
    agreeing: Images | None = Field(default=None, description="number of those images")
    compared_to: StageName | None = Field(default=None, description="the stage that the logit errors are against")
    max_error: Error | None = Field(default=None, description="largest absolute difference of a logit")
    mean_error: Error | None = Field(default=None, description="mean absolute difference of the logits")
    tolerance: Error | None = Field(default=None, description="largest max_error allowed; null where it is the slimming loss")
    non_finite: Count = Field(default=0, description="logits that are NaN or infinite")
    batches: BatchCheck | None = Field(default=None, description="null where it was not run at other batch sizes")
    status: Status = "not executed"
    note: Text = ""

    @model_validator(mode="after")
    def _check(self) -> Rung:
        drop = self.exact_drop()
        if (drop is None) != (self.top1_drop is None):
            raise ValueError("top1_drop: must come with the counts lost and gained")
        if drop is not None and self.top1_drop is not None and abs(self.top1_drop - float(drop)) > _ROUNDING:
            raise ValueError(f"top1_drop: {self.top1_drop} is not 100 * ({self.lost} - {self.gained}) / {self.images}")
        if (self.agreeing is None) != (self.agreement is None):
            raise ValueError("agreement: must come with the count agreeing")
        if self.agreement is not None and self.agreeing is not None:
            exact = 100 * self.agreeing / self.images if self.images else -1
            if abs(self.agreement - exact) > _ROUNDING:
                raise ValueError(f"agreement: {self.agreement} is not 100 * {self.agreeing} / {self.images}")
        if self.status != "not executed" and not self.images:
            raise ValueError(f"status: {self.status!r}, but no image was run")
        return self

    def exact_drop(self) -> Fraction | None:
        """Points of top-1 lost against the original, as an exact fraction of the integer counts; None without labels."""
        if self.lost is None or self.gained is None or not self.images:
            return None
        return Fraction(100 * (self.lost - self.gained), self.images)

    @property
    def changed(self) -> tuple[int, int]:
        """Images lost and gained against the original; without labels those that disagree with it count as lost."""
        if self.lost is None or self.gained is None:
            return self.images - (self.agreeing or 0), 0
        return self.lost, self.gained


class Gate(StrictRecord):
    """What a bundle must keep to be published."""

    max_top1_drop: Annotated[float, Field(ge=0, le=100)] = Field(default=0.2, description="points of top-1")
    rule: GateRule = Field(
        default="point", description="what must be within max_top1_drop: the drop, or the bad end of its 95 % interval"
    )


class Answers(StrictRecord):
    """How one of two compared models answers."""

    stage: StageName
    top1: Percent | None = Field(description="null without labels, as the two fields after it")
    top5: Percent | None
    calibration_error: Percent | None = Field(
        description="expected calibration error in percent: 15 bins of equal width (Guo et al., ICML 2017)"
    )
    confidence: Percent = Field(description="mean of the largest softmax probability, in percent")


class ClassChange(StrictRecord):
    """A class of which the two models answer different numbers of images rightly."""

    label: Count = Field(description="its place among the classes")
    images: Images
    original: Images = Field(description="of these, answered rightly by the original")
    candidate: Images


class Disagreement(StrictRecord):
    """An image that the two models answer differently; those of the largest divergence are listed, worst first."""

    image: Count = Field(description="its place among the evaluation images")
    label: Count | None = Field(description="null without labels")
    original: Count = Field(description="the class answered")
    candidate: Count
    divergence: Error = Field(description="KL divergence of the candidate's answer from the original's, in nats")


class Comparison(StrictRecord):
    """Original and candidate, the last stage that ran, on the same images."""

    images: Images
    original: Answers
    candidate: Answers
    mcnemar: Annotated[float, Field(ge=0, le=1)] | None = Field(
        description="exact two-sided p-value of McNemar's test that the two are equally often right; null without labels"
    )
    divergence: Error | None = Field(description="mean KL divergence in nats over the images with finite logits; null: none")
    classes: list[ClassChange] = Field(max_length=_MOST_CLASSES)
    worst: list[Disagreement] = Field(max_length=64)


class EngineRecord(StrictRecord):
    """What serves the slim graph."""

    backend: Name = Field(description="'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'openvino', ...")
    version: Text
    targets: list[Name] = Field(description="what it was built for, such as 'cpu' or 'sm89'")
    precision: Name
    fused_attentions: Count | None = Field(default=None, description="null where the backend does not say")
    attentions: Count | None = Field(default=None, description="attentions in the graph")
    narrow_share: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="share of the tensors between kernels with at most 16 bits, in int8 and fp8 with 8; null where not known",
    )
    files: list[PlainPath] = Field(default_factory=list, description="the engine's files in the bundle")
    settings: dict[str, JsonValue] = Field(default_factory=dict, description="what the engine was told, in its own words")
    weights_from: PlainPath | None = Field(
        default=None,
        description="the ONNX file of the bundle that engine files without weights are given them from when they are loaded; "
        "not written where they have their own",
    )
    status: Status = Field(description="whether it ran the evaluation images here, and how that ended")

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``weights_from`` where there is none: so it was written, and is read, by every earlier release."""
        written: dict[str, Any] = write(self)
        if self.weights_from is None:
            written.pop("weights_from", None)
        return written


class PrecisionTrial(StrictRecord):
    """A precision that was tried where the bundle was made, to take the fastest that passes the gate."""

    precision: Name
    status: Status = Field(description="by the gate; 'not executed' where it could not be tried")
    ms: Milliseconds | None = Field(
        default=None, description="median time of a batch in milliseconds, side by side with the others"
    )
    batch: Size | None = Field(default=None, description="images of that batch")
    top1_drop: Points | None = None
    kept: list[Name] = Field(default_factory=list, max_length=1024, description="parts that were not quantised")
    chosen: bool = False
    note: Text = ""


class BundledEngine(StrictRecord):
    """One of several engines of a bundle."""

    name: Name = Field(description="as it is asked for: 'ort', 'openvino', 'trt'")
    stage: StageName = Field(description="its rung")
    onnx: PlainPath = Field(description="the ONNX file that it runs, or was built from")
    macs: Macs = Field(description="as cuts are laid for it")
    engine: EngineRecord
    ms: Milliseconds | None = Field(
        default=None,
        description="median time of a batch where the bundle was made, milliseconds, side by side with others for its CPU",
    )
    batch: Size | None = Field(default=None, description="images of that batch")
    kept_parts: list[Name] = Field(default_factory=list, max_length=1024, description="parts that int8 leaves as they are")
    precision_trials: list[PrecisionTrial] = Field(default_factory=list, max_length=16, description="empty: it was asked for")


class Evaluation(StrictRecord):
    """The images that the rungs were measured on."""

    data: Name
    split: Text
    images: Images
    fingerprint: Text = Field(description="SHA-256 over the images and their classes, in order")


class Results(StrictRecord):
    """What the manifest and the parity report both carry."""

    macs: Macs
    evaluation: Evaluation
    rungs: list[Rung] = Field(min_length=1)
    engine: EngineRecord
    engines: list[BundledEngine] = Field(
        default_factory=list,
        max_length=16,
        description="every engine of a bundle of several, the first being engine",
    )

    @model_validator(mode="after")
    def _check_rungs(self) -> Results:
        rungs = {rung.stage: rung for rung in self.rungs}
        if len(rungs) != len(self.rungs):
            raise ValueError("rungs: a stage is named twice")
        if "engine" in rungs and rungs["engine"].status != self.engine.status:
            raise ValueError(f"engine: its status is {self.engine.status!r}, and its rung says otherwise")
        if not self.engines:
            return self
        if len(self.engines) == 1 or self.engines[0].engine != self.engine or self.engines[0].macs != self.macs:
            raise ValueError("engines: must be several, and engine and macs those of the first")
        if any(len({getattr(one, name) for one in self.engines}) != len(self.engines) for name in ("name", "stage")):
            raise ValueError("engines: a name or a stage is given twice")
        for one in self.engines:
            if one.stage not in rungs or rungs[one.stage].status != one.engine.status:
                raise ValueError(f"engines: {one.name}: its status is {one.engine.status!r}, and no rung {one.stage} says so")
        return self

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``engines`` where there is one: so it was written, and is read, by every earlier release."""
        written: dict[str, Any] = write(self)
        if not self.engines:
            written.pop("engines", None)
        return written

    def bundled(self, backend: str) -> BundledEngine | None:
        """Of several engines the one of ``backend``; None where it is not among them, or the bundle has one engine."""
        return next((one for one in self.engines if one.engine.backend == backend), None)

    @property
    def engines_by_stage(self) -> dict[str, EngineRecord]:
        """Every engine by its rung's stage, the first one first."""
        return {one.stage: one.engine for one in self.engines} or {"engine": self.engine}


class ParityReport(Results):
    """``parity.json``: one rung per stage, so that each loss is attributed to the stage that caused it."""

    schema_version: VersionOne = 1
    gate: Gate
    comparison: Comparison | None = Field(default=None, description="original and candidate, image by image")
    passed: bool = Field(description="no rung failed or is undecided, and at least one stage after the original was run")

    @model_validator(mode="after")
    def _check(self) -> ParityReport:
        if self.passed != ladder_passed(self.rungs):
            raise ValueError(f"passed: {self.passed} is not what the rungs say")
        return self


def ladder_passed(rungs: list[Rung]) -> bool:
    """Whether no rung failed or is undecided, and at least one stage after the original, which is the first, was run."""
    return all(rung.status in ("passed", "not executed") for rung in rungs) and any(
        rung.status == "passed" for rung in rungs[1:]
    )


def parity_schema() -> dict[str, object]:
    """The JSON Schema of ``parity.json``."""
    return ParityReport.model_json_schema()
