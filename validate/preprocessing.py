"""How a picture becomes a model's input: timm's evaluation transform, and the same as a rule that any client can follow."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, model_validator

from patchslim.records import StrictRecord

#: Pixels that a picture may be resized to: 8192 x 8192.
MAX_RESIZED_PIXELS = 1 << 26

_Size = Annotated[int, Field(ge=1, le=1 << 24)]
_Byte = Annotated[int, Field(ge=0, le=255)]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
Side = Literal["shorter", "longer", "both"]


class ResizeRule(StrictRecord):
    """The resize, of bytes, as Pillow's ``Image.resize`` does it.

    ``ratio`` is the smaller (``side`` "shorter") or the larger (``side`` "longer") of picture height / ``height`` and picture
    width / ``width``; both sides are divided by it. With ``side`` "both" the picture is stretched to ``height`` by ``width``.
    """

    side: Side = Field(description="which side of the picture is brought to its length here; the other keeps the aspect ratio")
    height: _Size = Field(description="pixels")
    width: _Size = Field(description="pixels")
    rounding: Literal["down", "half-even"] | None = Field(
        description="of the other side: 'down' is int(length * longer / shorter), for a square; 'half-even' is Python's "
        "round(picture side / ratio); null where nothing is rounded"
    )
    filter: Interpolation = Field(description="of Pillow's Image.Resampling")
    antialias: bool = Field(description="the filter is widened by the scale where the picture shrinks, as Pillow does")


class CropRule(StrictRecord):
    """The crop around the centre; a picture that is smaller is first padded to it, the smaller half of the margin before it."""

    mode: Literal["center"]
    height: _Size = Field(description="pixels")
    width: _Size = Field(description="pixels")
    offset_rounding: Literal["half-even"] = Field(description="top and left are Python's round((picture - crop) / 2)")
    fill: list[_Byte] = Field(min_length=1, max_length=3, description="of the padding, a value for each channel")


class PreprocessingRule(StrictRecord):
    """All that is done to a picture, in this order. Then ``mean`` is taken away and the result divided by ``std``.

    From ``divide_by`` on each of the three operations is one float32 operation, rounded as IEEE 754 says.
    """

    colours: Literal["RGB", "L"] = Field(description="as Pillow's Image.convert makes them; transparency is dropped")
    bits: Literal[8] = Field(description="per channel, before the resize; of 16 the high byte is kept")
    exif_orientation: Literal["ignored"]
    resize: ResizeRule
    crop: CropRule
    divide_by: Literal[255]
    layout: Literal["NCHW"] = Field(description="images, channels in the order of colours, rows from the top, columns")
    dtype: Literal["float32"]


class Preprocessing(StrictRecord):
    """timm's evaluation transform in full, as ``timm.data.resolve_model_data_config`` names it, and the rule that follows."""

    input_size: tuple[_Size, _Size, _Size] = Field(description="channels, height, width in pixels")
    interpolation: Interpolation
    crop_pct: Annotated[float, Field(gt=0, le=4)]
    crop_mode: Literal["center", "squash", "border"]
    mean: Annotated[list[FiniteFloat], Field(min_length=1, max_length=4)] = Field(
        description="per channel, of pixels in [0, 1]"
    )
    std: Annotated[list[Annotated[FiniteFloat, Field(gt=0)]], Field(min_length=1, max_length=4)]
    rule: PreprocessingRule | None = Field(
        default=None, description="the same as steps; null in bundles of before, and for 2 or 4 channels"
    )

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if not self.input_size[0] == len(self.mean) == len(self.std):
            raise ValueError(f"mean, std: need one value for each of {self.input_size[0]} channels")
        _, height, width = self.input_size
        smallest = min(1.0, self.crop_pct)
        if (height / smallest) * (width / smallest) > MAX_RESIZED_PIXELS:
            raise ValueError(f"input_size, crop_pct: ask for images of more than {MAX_RESIZED_PIXELS} pixels")
        if self.rule is not None and self.rule != self.derived_rule():
            raise ValueError("rule: is not the one that input_size, interpolation, crop_pct, crop_mode and mean give")
        return self

    def derived_rule(self) -> PreprocessingRule | None:
        """The rule that timm's names stand for; None where no picture has as many channels. Raises ``ValueError``.

        Source: ``transforms_imagenet_eval`` of timm, over torchvision's rounding of sizes and offsets.
        """
        channels, height, width = self.input_size
        if channels not in (1, 3):
            return None
        scaled = math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)
        side, rounding = _resize_form(self.crop_mode, square=scaled[0] == scaled[1])
        fill = (
            [round(min(255.0, max(0.0, 255 * value))) for value in self.mean] if self.crop_mode == "border" else [0] * channels
        )
        return PreprocessingRule(
            colours="RGB" if channels == 3 else "L",
            bits=8,
            exif_orientation="ignored",
            resize=ResizeRule(
                side=side,
                height=scaled[0],
                width=scaled[1],
                rounding=rounding,
                filter=self.interpolation,
                antialias=self.interpolation != "nearest",
            ),
            crop=CropRule(mode="center", height=height, width=width, offset_rounding="half-even", fill=fill),
            divide_by=255,
            layout="NCHW",
            dtype="float32",
        )

    def with_rule(self) -> Preprocessing:
        """The same with the rule that it stands for."""
        return self.model_copy(update={"rule": self.derived_rule()})


def _resize_form(crop_mode: str, *, square: bool) -> tuple[Side, Literal["down", "half-even"] | None]:
    if crop_mode == "squash":
        return "both", None
    if crop_mode == "center":  # torchvision resizes to a square, timm to anything else
        return "shorter", "down" if square else "half-even"
    return "longer", "half-even"
