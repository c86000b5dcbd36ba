"""The bundle's contracts: ``manifest.json`` and ``parity.json``, strict and versioned. Free of numpy, ONNX and torch."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from patchslim.choices import Layout
from patchslim.records import StrictRecord, VersionOne
from validate.preprocessing import Preprocessing

#: ``undecided``: the gate asks for confidence, and so few images can tell neither way.
Status = Literal["passed", "failed", "undecided", "not executed"]
#: The stages of a parity report in order; an export may add others, such as ``onnx-slim-int8``.
STAGES = ("pytorch", "pytorch-slim", "onnx-slim", "onnx-slim-fp16", "engine")

_Count = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
#: No set of images is larger, and the binomial distribution is known so far (validate.comparison.mcnemar).
_Images = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
_Size = Annotated[int, Field(ge=1, le=1 << 24)]
_Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
_Points = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Ms = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_MOST_CLASSES = 1 << 16
GateRule = Literal["point", "confidence"]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Stage = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]
_Text = Annotated[str, Field(max_length=4096)]
_Name = Annotated[str, Field(min_length=1, max_length=1024)]
_MADE_LAST = {"manifest.json", "SHA256SUMS", "model.sig"}  # files that have, each, the digests of those before
_ROUNDING = 1e-6  # points and percentages are written as floats; the integer counts beside them are the truth


def plain_path(text: str) -> str:
    """Return ``text`` if it is a plain relative POSIX path that stays inside the bundle; raises ``ValueError``."""
    if not text or len(text) > 512 or re.search(r"[\\:\x00-\x1f\x7f]", text):
        raise ValueError(f"{text[:80]!r} is not a plain relative path")
    if any(part in ("", ".", "..") for part in text.split("/")):
        raise ValueError(f"{text[:80]!r} is not a plain relative path: it must stay inside the bundle")
    return text


PlainPath = Annotated[str, AfterValidator(plain_path)]


class Macs(StrictRecord):
    """Multiply-accumulates of one image."""

    dense: _Count
    slim: _Count
    reduction: Annotated[float, Field(ge=0, le=1)] = Field(description="fraction saved: 1 - slim / dense")
    layout: Layout = Field(description="how the cut blocks' projections are laid")

    @model_validator(mode="after")
    def _check(self) -> Macs:
        if not self.dense or abs(self.reduction - (1 - self.slim / self.dense)) > _ROUNDING:
            raise ValueError(f"reduction: {self.reduction} is not 1 - {self.slim} / {self.dense}")
        return self


class BatchCheck(StrictRecord):
    """The golden inputs run again in batches of other sizes: an answer must not depend on what is beside it."""

    sizes: list[_Size] = Field(min_length=1, max_length=16, description="images per run, the last of which may be smaller")
    max_error: _Error | None = Field(description="largest difference of a logit; null where none is finite on both sides")
    tolerance: _Error = Field(description="largest max_error allowed")


class Rung(StrictRecord):
    """One stage of an export, measured on the evaluation images.

    Slimming loss and numerical loss are never one number: ``top1_drop`` is against the original, ``max_error`` against the
    stage named in ``compared_to``.
    """

    stage: _Stage
    images: _Images
    top1: _Percent | None = Field(default=None, description="percent; null where the images have no labels")
    top5: _Percent | None = None
    top1_drop: _Points | None = Field(default=None, description="points lost against the original; negative is a gain")
    lost: _Images | None = Field(default=None, description="images that the original answers rightly and this stage wrongly")
    gained: _Images | None = Field(default=None, description="images that the original answers wrongly and this stage rightly")
    drop_interval: tuple[_Points, _Points] | None = Field(default=None, description="95 % confidence interval of top1_drop")
    agreement: _Percent | None = Field(default=None, description="percent of images whose top-1 equals the original's")
    agreeing: _Images | None = Field(default=None, description="number of those images")
    compared_to: _Stage | None = Field(default=None, description="the stage that the logit errors are against")
    max_error: _Error | None = Field(default=None, description="largest absolute difference of a logit")
    mean_error: _Error | None = Field(default=None, description="mean absolute difference of the logits")
    tolerance: _Error | None = Field(default=None, description="largest max_error allowed; null where it is the slimming loss")
    non_finite: _Count = Field(default=0, description="logits that are NaN or infinite")
    batches: BatchCheck | None = Field(default=None, description="null where it was not run at other batch sizes")
    status: Status = "not executed"
    note: _Text = ""

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

    stage: _Stage
    top1: _Percent | None = Field(description="null without labels, as the two fields after it")
    top5: _Percent | None
    calibration_error: _Percent | None = Field(
        description="expected calibration error in percent: 15 bins of equal width (Guo et al., ICML 2017)"
    )
    confidence: _Percent = Field(description="mean of the largest softmax probability, in percent")


class ClassChange(StrictRecord):
    """A class of which the two models answer different numbers of images rightly."""

    label: _Count = Field(description="its place among the classes")
    images: _Images
    original: _Images = Field(description="of these, answered rightly by the original")
    candidate: _Images


class Disagreement(StrictRecord):
    """An image that the two models answer differently; those of the largest divergence are listed, worst first."""

    image: _Count = Field(description="its place among the evaluation images")
    label: _Count | None = Field(description="null without labels")
    original: _Count = Field(description="the class answered")
    candidate: _Count
    divergence: _Error = Field(description="KL divergence of the candidate's answer from the original's, in nats")


class Comparison(StrictRecord):
    """Original and candidate, the last stage that ran, on the same images."""

    images: _Images
    original: Answers
    candidate: Answers
    mcnemar: Annotated[float, Field(ge=0, le=1)] | None = Field(
        description="exact two-sided p-value of McNemar's test that the two are equally often right; null without labels"
    )
    divergence: _Error | None = Field(description="mean KL divergence in nats over the images with finite logits; null: none")
    classes: list[ClassChange] = Field(max_length=_MOST_CLASSES)
    worst: list[Disagreement] = Field(max_length=64)


class EngineRecord(StrictRecord):
    """What serves the slim graph."""

    backend: _Name = Field(description="'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'openvino', ...")
    version: _Text
    targets: list[_Name] = Field(description="what it was built for, such as 'cpu' or 'sm89'")
    precision: _Name
    fused_attentions: _Count | None = Field(default=None, description="null where the backend does not say")
    attentions: _Count | None = Field(default=None, description="attentions in the graph")
    narrow_share: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="share of the tensors between kernels with at most 16 bits; null where that is not known",
    )
    files: list[PlainPath] = Field(default_factory=list, description="the engine's files in the bundle")
    settings: dict[str, JsonValue] = Field(default_factory=dict, description="what the engine was told, in its own words")
    status: Status = Field(description="whether it ran the evaluation images here, and how that ended")


class PrecisionTrial(StrictRecord):
    """A precision that was tried where the bundle was made, to take the fastest that passes the gate."""

    precision: _Name
    status: Status = Field(description="by the gate; 'not executed' where it could not be tried")
    ms: _Ms | None = Field(default=None, description="median time of a batch in milliseconds, side by side with the others")
    batch: _Size | None = Field(default=None, description="images of that batch")
    top1_drop: _Points | None = None
    kept: list[_Name] = Field(default_factory=list, max_length=1024, description="parts that were not quantised")
    chosen: bool = False
    note: _Text = ""


class Evaluation(StrictRecord):
    """The images that the rungs were measured on."""

    data: _Name
    split: _Text
    images: _Images
    fingerprint: _Text = Field(description="SHA-256 over the images and their classes, in order")


class _Results(StrictRecord):
    """What the manifest and the parity report both carry."""

    macs: Macs
    evaluation: Evaluation
    rungs: list[Rung] = Field(min_length=1)
    engine: EngineRecord

    @model_validator(mode="after")
    def _check_rungs(self) -> _Results:
        stages = [rung.stage for rung in self.rungs]
        if len(set(stages)) != len(stages):
            raise ValueError("rungs: a stage is named twice")
        if any(rung.stage == "engine" and rung.status != self.engine.status for rung in self.rungs):
            raise ValueError(f"engine: its status is {self.engine.status!r}, and its rung says otherwise")
        return self


class ParityReport(_Results):
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


class TensorSpec(StrictRecord):
    """An input or output tensor."""

    name: _Name
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: list[Literal["batch"] | _Size] = Field(
        min_length=2, max_length=8, description="'batch' where the batch size is free"
    )


class FileRecord(StrictRecord):
    """One file of the bundle."""

    path: PlainPath
    size: _Count = Field(description="bytes")
    sha256: _Sha256


class Weights(StrictRecord):
    """Where the weights came from."""

    source: _Name
    sha256: _Sha256 | None = None
    license: _Text | None = Field(
        default=None, description="what they may be used under, as an SPDX name; null where not known"
    )


class CalibrationRecord(StrictRecord):
    """What the plan was found on."""

    data: _Name
    images: _Images
    share: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="fraction of the data set's split")
    fingerprint: _Text


class LatencyRecord(StrictRecord):
    """A budget of latency: what was asked, what the latency table promised, and what was measured in the end.

    Times are of one batch, medians in milliseconds. What was measured is null where the engine did not run where it was built.
    """

    criterion: Literal["latency-reduction", "latency-budget-ms"]
    asked: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        description="fraction of the dense model's latency to remove, or milliseconds that a batch may take"
    )
    batch: _Size = Field(description="images per batch")
    device: _Text = Field(description="the processor that the table was measured on")
    table_dense_ms: _Ms
    promised_ms: _Ms = Field(description="of the plan, by the table")
    measured_on: _Text | None = Field(default=None, description="the processor that the finished graph was measured on")
    dense_ms: _Ms | None = Field(default=None, description="measured side by side with measured_ms")
    measured_ms: _Ms | None = Field(default=None, description="of the finished graph")


class GoldenImage(StrictRecord):
    """A picture, lossless and before any preprocessing, that one row of ``golden.npz`` was made of."""

    path: PlainPath = Field(description="a PNG file of 8 bits per channel")
    row: _Count = Field(description="of inputs, labels and logits in golden.npz")


class OnnxRecord(StrictRecord):
    """One ONNX file of the bundle and what it must answer on the golden inputs in ONNX Runtime."""

    path: PlainPath
    stage: _Stage
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="of its input and output")
    max_error: _Error | None = Field(description="largest |logit - slim_logits| allowed; null: not runnable in ONNX Runtime")
    min_agreement: _Percent = Field(default=100.0, description="percent of golden inputs with slim_logits' top-1")


class Manifest(_Results):
    """``manifest.json``: everything another team needs to check and serve the bundle. No dates: a bundle is reproducible."""

    schema_version: VersionOne = 1
    name: _Name = Field(description="the bundle's name, fit for a serving configuration")
    model: _Name = Field(description="timm's model name")
    model_args: dict[str, JsonValue] = Field(default_factory=dict, description="arguments of timm.create_model")
    weights: Weights
    plan_digest: _Sha256 = Field(description="SHA-256 of plan.json's bytes")
    tools: dict[str, str] = Field(description="versions of the tools that built the bundle")
    target: dict[str, JsonValue] = Field(default_factory=dict, description="the deployment target that was asked for")
    precision: _Name
    inputs: list[TensorSpec] = Field(min_length=1, max_length=1)
    outputs: list[TensorSpec] = Field(min_length=1, max_length=1)
    preprocessing: Preprocessing
    labels: list[str] = Field(description="class names in output order; empty if unknown")
    calibration: CalibrationRecord | None = None
    latency: LatencyRecord | None = Field(default=None, description="where the plan was found within a budget of latency")
    precision_trials: list[PrecisionTrial] = Field(default_factory=list, max_length=16, description="empty: it was asked for")
    kept_parts: list[_Name] = Field(
        default_factory=list, max_length=1024, description="parts of the model that int8 leaves as they are, by --mixed auto"
    )
    golden_images: list[GoldenImage] = Field(
        default_factory=list,
        description="what preprocessing.rule makes of each is its row of inputs in golden.npz, bit for bit",
    )
    tokens_per_block: list[_Size] = Field(min_length=1, description="tokens that each block's output has")
    onnx: list[OnnxRecord] = Field(min_length=1)
    files: list[FileRecord] = Field(min_length=1, description="every file but manifest.json, sorted by path")

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        names = [file.path for file in self.files]
        if len({name.casefold() for name in names}) != len(names) or _MADE_LAST & {*names}:
            raise ValueError("files: a path is listed twice, or manifest.json lists itself, SHA256SUMS or model.sig")
        graphs = [record.path for record in self.onnx]
        if len(set(graphs)) != len(graphs):
            raise ValueError("onnx: a path is listed twice")
        pictures = [image.path for image in self.golden_images]
        if len(set(pictures)) != len(pictures) or len({image.row for image in self.golden_images}) != len(pictures):
            raise ValueError("golden_images: a path or a row is listed twice")
        if pictures and self.preprocessing.rule is None:
            raise ValueError("golden_images: there is no preprocessing.rule to make tensors of them")
        for path in [*graphs, *self.engine.files, *pictures, "plan.json", "golden.npz", "parity.json"]:
            if path not in names:
                raise ValueError(f"files: lacks {path}")
        if unrecorded := [name for name in names if name.casefold().endswith(".onnx") and name not in graphs]:
            raise ValueError(f"onnx: lacks {unrecorded[0]}")
        if all(record.max_error is None for record in self.onnx):
            raise ValueError("onnx: no file has a max_error, so nothing could be checked")
        if any(record.max_error is not None and record.dtype == "bfloat16" for record in self.onnx):
            raise ValueError("onnx: a bfloat16 file does not run in ONNX Runtime on a CPU; its max_error must be null")
        if self.inputs[0].shape[1:] != list(self.preprocessing.input_size):
            raise ValueError("inputs: the shape is not preprocessing.input_size")
        if len(self.outputs[0].shape) != 2 or self.outputs[0].shape[0] != self.inputs[0].shape[0]:
            raise ValueError("outputs: the shape must be the input's batch by classes")
        if self.outputs[0].shape[1] == "batch" or (self.labels and len(self.labels) != self.outputs[0].shape[1]):
            raise ValueError(f"labels: {len(self.labels)} for {self.outputs[0].shape[1]} classes")
        return self

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return int(self.outputs[0].shape[1])


def manifest_schema() -> dict[str, object]:
    """The JSON Schema of ``manifest.json``."""
    return Manifest.model_json_schema()


def parity_schema() -> dict[str, object]:
    """The JSON Schema of ``parity.json``."""
    return ParityReport.model_json_schema()
