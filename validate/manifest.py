"""``manifest.json``: everything another team needs to check and serve a bundle; strict and versioned. Free of numpy, ONNX."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from patchslim.records import StrictRecord, VersionOne
from validate.fields import (
    Count,
    Error,
    Images,
    Milliseconds,
    Name,
    Percent,
    PlainPath,
    Sha256,
    Size,
    StageName,
    Text,
)
from validate.parity_records import PrecisionTrial, Results
from validate.preprocessing import Preprocessing

_MADE_LAST = {"manifest.json", "SHA256SUMS", "model.sig"}  # files that have, each, the digests of those before


class TensorSpec(StrictRecord):
    """An input or output tensor."""

    name: Name
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: list[Literal["batch"] | Size] = Field(min_length=2, max_length=8, description="'batch' where the batch size is free")


class FileRecord(StrictRecord):
    """One file of the bundle."""

    path: PlainPath
    size: Count = Field(description="bytes")
    sha256: Sha256


class Weights(StrictRecord):
    """Where the weights came from."""

    source: Name
    sha256: Sha256 | None = None
    license: Text | None = Field(default=None, description="what they may be used under, as an SPDX name; null where not known")


class CalibrationRecord(StrictRecord):
    """What the plan was found on."""

    data: Name
    images: Images
    share: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="fraction of the data set's split")
    fingerprint: Text


class LatencyRecord(StrictRecord):
    """A budget of latency: what was asked, what the latency table promised, and what was measured in the end.

    Times are of one batch, medians in milliseconds. What was measured is null where the engine did not run where it was built.
    """

    criterion: Literal["latency-reduction", "latency-budget-ms"]
    asked: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        description="fraction of the dense model's latency to remove, or milliseconds that a batch may take"
    )
    batch: Size = Field(description="images per batch")
    device: Text = Field(description="the processor that the table was measured on")
    table_dense_ms: Milliseconds
    promised_ms: Milliseconds = Field(description="of the plan, by the table")
    measured_on: Text | None = Field(default=None, description="the processor that the finished graph was measured on")
    dense_ms: Milliseconds | None = Field(default=None, description="measured side by side with measured_ms")
    measured_ms: Milliseconds | None = Field(default=None, description="of the finished graph")


class GoldenImage(StrictRecord):
    """A picture, lossless and before any preprocessing, that one row of ``golden.npz`` was made of."""

    path: PlainPath = Field(description="a PNG file of 8 bits per channel")
    row: Count = Field(description="of inputs, labels and logits in golden.npz")


class OnnxRecord(StrictRecord):
    """One ONNX file of the bundle and what it must answer on the golden inputs in ONNX Runtime."""

    path: PlainPath
    stage: StageName
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="of its input and output")
    max_error: Error | None = Field(description="largest |logit - slim_logits| allowed; null: not runnable in ONNX Runtime")
    min_agreement: Percent = Field(default=100.0, description="percent of golden inputs with slim_logits' top-1")


class Manifest(Results):
    """``manifest.json``: everything another team needs to check and serve the bundle. No dates: a bundle is reproducible."""

    schema_version: VersionOne = 1
    name: Name = Field(description="the bundle's name, fit for a serving configuration")
    model: Name = Field(description="timm's model name")
    model_args: dict[str, JsonValue] = Field(default_factory=dict, description="arguments of timm.create_model")
    weights: Weights
    plan_digest: Sha256 = Field(description="SHA-256 of plan.json's bytes")
    tools: dict[str, str] = Field(description="versions of the tools that built the bundle")
    target: dict[str, JsonValue] = Field(default_factory=dict, description="the deployment target that was asked for")
    precision: Name
    inputs: list[TensorSpec] = Field(min_length=1, max_length=1)
    outputs: list[TensorSpec] = Field(min_length=1, max_length=1)
    preprocessing: Preprocessing
    labels: list[str] = Field(description="class names in output order; empty if unknown")
    calibration: CalibrationRecord | None = None
    latency: LatencyRecord | None = Field(default=None, description="where the plan was found within a budget of latency")
    precision_trials: list[PrecisionTrial] = Field(default_factory=list, max_length=16, description="empty: it was asked for")
    kept_parts: list[Name] = Field(
        default_factory=list, max_length=1024, description="parts of the model that int8 leaves as they are, by --mixed auto"
    )
    golden_images: list[GoldenImage] = Field(
        default_factory=list,
        description="what preprocessing.rule makes of each is its row of inputs in golden.npz, bit for bit",
    )
    tokens_per_block: list[Size] = Field(min_length=1, description="tokens that each block's output has")
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
        engine_files = [path for one in self.engines_by_stage.values() for path in one.files]
        for path in [*graphs, *engine_files, *pictures, "plan.json", "golden.npz", "parity.json"]:
            if path not in names:
                raise ValueError(f"files: lacks {path}")
        if absent := [one.onnx for one in self.engines if one.onnx not in graphs]:
            raise ValueError(f"engines: {absent[0]} is no file of onnx")
        needed = [one.weights_from for one in self.engines_by_stage.values() if one.weights_from is not None]
        if absent := [path for path in needed if path not in graphs]:
            raise ValueError(f"engine: weights_from: {absent[0]} is no file of onnx")
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
